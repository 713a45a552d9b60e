"""Forty messages that people type first: greetings, questions and requests, in several languages."""

from __future__ import annotations

import unicodedata

OPENERS = (
    "hello",
    "hi",
    "Hey",
    "hello there",
    "Good morning!",
    "how are you?",
    "Who are you?",
    "What can you do?",
    "Thanks!",
    "ok",
    "yes",
    "test",
    "help",
    "Tell me a joke.",
    "What is the capital of France?",
    "What is 2+2?",
    "Name a famous painter.",
    "Name three colours.",
    "Why do cats purr?",
    "What is machine learning?",
    "What's the weather like today?",
    "Can you recommend a book?",
    "I feel sad today.",
    "Write a short poem about the sea.",
    "Write a haiku about autumn leaves on a quiet pond.",
    "Write a Python function that reverses a string.",
    "Help me write an email to my boss.",
    "Summarize the plot of Romeo and Juliet.",
    "Give me a recipe for chocolate chip cookies.",
    "I'm planning a trip to Japan in April. What should I see?",
    "Rewrite this to sound more formal: gimme the report asap.",
    "Bonjour",
    "Peux-tu m'aider ?",
    "Hola, ¿cómo estás?",
    "Guten Tag",
    "Was ist die Hauptstadt von Deutschland?",
    "Ciao, come stai?",
    "Привет",
    "你好",
    "こんにちは",
)


def begins_an_answer(text: str) -> bool:
    """Whether a text begins as an answer does, and does not go on with the prompt."""
    first = text[:1]
    return bool(first) and not first.islower() and (unicodedata.category(first)[0] in "LNS" or first in "\"'`*¡¿")
