#!/bin/sh
# Three prompts of different tasks, each answered by a blend that retrieval chose. Usage: demo.sh EDGECOMPOSE BUNDLE
set -eu
edgecompose=$1
bundle=$2

ask() {
    printf '\n\033[1m%s\033[0m\n\n' "$1"
    "$edgecompose" run "$bundle" "$1" --explain
}

ask 'Customer review of a business: We waited an hour, the food was cold and nobody said sorry. We will not be back.
Would you call this customer'"'"'s experience positive or negative?
Answer:'

ask 'Passage: The old mill by the river was built in 1820 by the Harmon family. It ground wheat until 1931, when a flood broke its wheel, and it has been a museum since 1968.

Question: Who built the old mill?
Answer with words from the passage.
Answer:'

ask 'First: The company said on Friday that it will close two of its factories next year.
Second: Two factories will be closed next year, the company announced on Friday.
Do both sentences mean the same? Say yes or no.
Answer:'
