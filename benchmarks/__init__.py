"""The programs behind the figures; README.md says how to run them."""
