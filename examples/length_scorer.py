"""Scores answers by their length: an example of a program for the operator `subprocess`.

Reads one JSON object a line, and writes one for each, in the same order:

    {"id": "7.0", "prompt": "...", "response": "..."}            ->  {"id": "7.0", "values": {"score": -0.25}}
    {"id": "7.1", "prompt": "...", "chosen": "...", "rejected": "..."}
        ->  {"id": "7.1", "values": {"chosen_score": 0.0, "rejected_score": -0.5}}

0 is the best score, for an answer of exactly `--target` words. With `--margin`, pairs whose chosen answer is not better
by that much are dropped. A reward model takes the place of `score`.
"""

import argparse
import json
import sys


def score(text, target):
    return -abs(len(text.split()) - target) / target


def answer(record, target, margin):
    if "response" in record:
        return {"values": {"score": score(record["response"], target)}}
    values = {f"{part}_score": score(record[part], target) for part in ("chosen", "rejected") if part in record}
    if margin is not None and values["chosen_score"] - values["rejected_score"] < margin:
        return {"drop": True}
    return {"values": values}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=int, default=40, help="words of a perfect answer")
    parser.add_argument("--margin", type=float, help="by how much a chosen answer must be better")
    arguments = parser.parse_args()
    print(f"scoring answers against {arguments.target} words", file=sys.stderr)
    for line in sys.stdin:
        record = json.loads(line)
        result = answer(record, arguments.target, arguments.margin)
        # Flushed, since sapo-flow waits for it.
        print(json.dumps({"id": record["id"], **result}), flush=True)


main()
