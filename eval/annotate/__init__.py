"""Human preferences: a web application for blinded comparisons, and what becomes of its votes."""
