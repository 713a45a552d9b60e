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
#: Prompts of tasks that differ, so that each is answered under a blend of its own.
TASK_PROMPTS = (
    "Customer review of a business: The soup came cold and nobody said sorry.\n"
    "Would you call this customer's experience positive or negative?\nAnswer:",
    "A photo is described as: Two dogs run across a frozen lake.\nIs it then true that: The animals sleep.\n"
    "Say yes, maybe or no.\nAnswer:",
    "Name three fruits that are yellow, and say where each of them grows.",
    "Use common sense to answer.\n\nQuestion: Where would you put a plate after washing it?\n"
    "Options:\n- cupboard\n- garden\n- car\n- river\n- attic\nAnswer:",
    "Write a short greeting for a birthday card to a friend who likes to hike.",
    "First: The shop opens at nine on weekdays.\nSecond: On Mondays the shop is open from nine.\n"
    "Do both sentences mean the same? Say yes or no.\nAnswer:",
    "Passage: The old mill ground wheat until 1931, when a flood broke its wheel.\n\n"
    "Question: What broke the wheel of the mill?\nAnswer with words from the passage.\nAnswer:",
    "What comes after this in the story? Anna packed her tent, filled two bottles with water and locked the door.",
)
