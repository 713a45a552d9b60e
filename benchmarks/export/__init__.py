"""Parts of `bases.py`: real bases before and after export, their cost, speed and memory, and the table."""
