"""Prompts on which several benchmarks measure."""

from __future__ import annotations

#: A prompt of the usual length of a task's prompts.
PROMPT = (
    "Customer review of a business: We waited forty minutes for a table we had booked, and the soup came cold. "
    "The waiter was kind about it and took it off the bill, but I would not go back on a busy evening.\n"
    "Would you call this customer's experience positive or negative?\nAnswer:"
)
SHORT_PROMPT = "What is the capital of France?"
#: Lengths in tokens at which prompts are read.
LENGTHS = (32, 256, 1024)
