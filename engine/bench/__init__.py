"""``main.py bench``: what limits training on the user's own data and machine."""
