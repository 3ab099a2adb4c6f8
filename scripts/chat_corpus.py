"""The English files of chatterbot-corpus as rows of chat messages.

A conversation is a list of lines, user and assistant in turn. It gives one row for each assistant line: that line is
the answer, everything before it the prompt. In three files the lines after the first are alternative answers to it.

Rows are left out when they repeat another row, and when the answer has fewer than MIN_ANSWER_WORDS words: more than
half of the corpus is trivia answered in a word or two, where there is no segment to rewrite. About every tenth question
is held out, chosen by a hash of the question, so that no held-out question (or answer) is ever trained on.

The corpus has no bad answers. The offline pairs for the baselines (DPO, ORPO) take as the rejected answer the right
answer to another question: easy to tell apart, enough to see the pipelines work.
"""

import glob
import hashlib
import json
import os

ALTERNATIVE_ANSWERS = {"computers.yml", "emotion.yml", "psychology.yml"}
MIN_ANSWER_WORDS = 8
HELD_OUT_ONE_IN = 10


def convert(corpus, yaml):
    """Rows to train on, rows held out, and a line of statistics.

    `corpus` is the folder of YAML files, `yaml` the parser module.
    """
    lines = []
    for path in sorted(glob.glob(os.path.join(corpus, "*.yml"))):
        with open(path, encoding="utf-8") as file:
            conversations = yaml.safe_load(file)["conversations"]
        for conversation in conversations:
            if isinstance(conversation, list):
                spoken = [str(line).strip() for line in conversation]
                lines += _rows(spoken, os.path.basename(path) in ALTERNATIVE_ANSWERS)
    unique = list(dict.fromkeys(lines))
    kept = [row for row in unique if all(row) and len(row[-1].split()) >= MIN_ANSWER_WORDS]

    train = [row for row in kept if not _held_out(row)]
    trained_answers = {row[-1] for row in train}
    held_out = [row for row in kept if _held_out(row) and row[-1] not in trained_answers]

    words = sorted(len(row[-1].split()) for row in train)
    statistics = (
        f"{len(train)} rows to train on and {len(held_out)} held out, of {len(lines)} in the corpus "
        f"({len(lines) - len(unique)} repeated, {len(unique) - len(kept)} with answers under {MIN_ANSWER_WORDS} words); "
        f"words in an answer: median {words[len(words) // 2]}, 90% up to {words[len(words) * 9 // 10]}, "
        f"longest {words[-1]}"
    )
    return [_messages(row) for row in train], [_messages(row) for row in held_out], statistics


def offline_pairs(rows):
    """Rows as prompt, chosen and rejected, the rejected answer being that of a row half the corpus away."""
    pairs = []
    for index, row in enumerate(rows):
        *prompt, chosen = row["messages"]
        rejected = rows[(index + len(rows) // 2) % len(rows)]["messages"][-1]
        if rejected != chosen:
            pairs.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return pairs


def write_jsonl(path, rows):
    """Write one JSON object a line, complete or not at all."""
    with open(path + ".partial", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".partial", path)


def _rows(spoken, alternatives):
    if alternatives:
        return [(spoken[0], answer) for answer in spoken[1:]]
    return [tuple(spoken[:end]) for end in range(2, len(spoken) + 1, 2)]


def _held_out(row):
    return int(hashlib.sha256(row[0].lower().encode("utf-8")).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def _messages(row):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(row)]}
