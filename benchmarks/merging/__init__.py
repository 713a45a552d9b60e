"""Parts of `merge.py`: the same merges by PEFT."""
