"""Label files: the accepted forms (README.md), examples, and builders from public tables."""
