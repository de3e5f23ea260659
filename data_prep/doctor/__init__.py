"""`posttrain data doctor`: what files are, what is wrong with them, which configuration ingests them."""
