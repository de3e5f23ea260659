"""What is kept about served traffic, in one SQLite file."""
