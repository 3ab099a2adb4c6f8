"""The peer's data, segments and buffer: the rules of operators/segments.rs, in Python."""

import json
from collections import deque


def read_rows(path, tokenizer):
    """(prompt ids, answer ids) of each conversation; the answer ends in EOS."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            answer_ids = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
            rows.append((prompt_ids, answer_ids + [tokenizer.eos_token_id]))
    return rows


def read_plan(path):
    """What sapo-flow's sample_sink wrote: for each step (row, start, tokens written, whether EOS is the last of them)."""
    steps = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            pair = json.loads(line)
            segment = pair["segment"]
            planned = (pair["row"], segment["start"], segment["len"], segment["ended"])
            steps.setdefault(pair["step"], []).append(planned)
    return steps


def fit(prompt, answer, max_length, max_prompt):
    """Cut to max_length together, where they are longer: the prompt's beginning, then the answer's end."""
    if len(prompt) + len(answer) <= max_length:
        return prompt, answer
    kept = min(len(prompt), max_prompt, max_length)
    return prompt[len(prompt) - kept:], answer[:max_length - kept]


def segment_bounds(prompt_tokens, answer_tokens, segment_tokens, max_length, max_prompt):
    """A segment's length, and the largest start it may have."""
    room = max(0, max_length - min(prompt_tokens, max_prompt))
    length = min(segment_tokens, answer_tokens)
    last_start = min(max(0, answer_tokens - 3 - length), max(0, room - length))
    return (min(length, room) if prompt_tokens + answer_tokens > max_length else length), last_start


def splice(answer, start, length, generated, eos):
    """The rejected response: `generated` in place of the segment, ending at its EOS if it has one."""
    generated = generated[:length]
    if eos in generated:
        return answer[:start] + generated[:generated.index(eos) + 1]
    return answer[:start] + generated + answer[start + length:]


class ReplayBuffer:
    """First in, first out; draws with p proportional to 1 / (1 + times drawn), or of the oldest, which leave."""

    def __init__(self, capacity=2000):
        self.pairs, self.drawn = deque(maxlen=capacity), deque(maxlen=capacity)

    def add(self, pair):
        self.pairs.append(pair)
        self.drawn.append(0)

    def probabilities(self):
        weights = [1 / (1 + drawn) for drawn in self.drawn]
        total = sum(weights)
        return [weight / total for weight in weights]

    def draw(self, count, chance):
        count = min(count, len(self.pairs))
        indices = chance.choices(range(len(self.pairs)), weights=self.probabilities(), k=count)
        for index in indices:
            self.drawn[index] += 1
        return [self.pairs[index] for index in indices]

    def take(self, count):
        pairs = [self.pairs.popleft() for _ in range(min(count, len(self.pairs)))]
        for _ in pairs:
            self.drawn.popleft()
        return pairs
