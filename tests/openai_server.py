"""A server with OpenAI's HTTP interface that answers by rule, for tests of its clients. Prints its port when it listens.

/v1/completions answers with the prompt's last word, 1 + seed % 3 times, cut to max_tokens words. Words in angle brackets
do not count, and a prompt of token ids is the word `a`. /v1/chat/completions answers with `--chat`, in which `%d` becomes
the number of words of the last message.

--key K        refuses requests without that key
--fail LIST    what to do with the first requests instead: a status, `drop` (hang up) or `silent` (never answer)
--hold N       answers N requests at a time, once all of them are there, the last first
--reply TEXT   answers every request with this text
--log FILE     appends each request as a JSON line: path, key, body, in_flight
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--key")
parser.add_argument("--fail", default="")
parser.add_argument("--hold", type=int)
parser.add_argument("--reply")
parser.add_argument("--chat", default="Score: %d")
parser.add_argument("--log", required=True)
options = parser.parse_args()

state = threading.Condition()
failures = [word for word in options.fail.split(",") if word]
in_flight = 0
arrivals = 0
answered = set()


def hold():
    """Wait until the N requests are there of which this is one, and those of them that came later are answered."""
    global arrivals
    with state:
        number = arrivals
        arrivals += 1
        last = number - number % options.hold + options.hold - 1
        state.notify_all()
        later = range(number + 1, last + 1)
        if not state.wait_for(lambda: arrivals > last and answered.issuperset(later), timeout=60):
            raise TimeoutError("too few requests at a time")
    return number


def let_others_go(number):
    with state:
        answered.add(number)
        state.notify_all()


def complete(body):
    prompt = body["prompt"] if isinstance(body["prompt"], str) else "a"
    word = [word for word in prompt.split() if not word.startswith("<")][-1]
    words = [word] * (1 + body.get("seed", 0) % 3)
    cut = words[: body["max_tokens"]]
    return {"text": " ".join(cut), "finish_reason": "stop" if cut == words else "length", "index": 0}


def chat(body):
    content = options.chat.replace("%d", str(len(body["messages"][-1]["content"].split())))
    return {"message": {"role": "assistant", "content": content}, "finish_reason": "stop", "index": 0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        global in_flight
        self.is_in_flight = True
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        with state:
            in_flight += 1
            failure = failures.pop(0) if failures else None
            record = {"path": self.path, "key": key, "body": body, "in_flight": in_flight}
            with open(options.log, "a") as log:
                log.write(json.dumps(record) + "\n")
        try:
            self.answer(body, key, failure)
        finally:
            self.leave()

    def leave(self):
        """No longer in flight: before the reply goes, since the client may ask again as soon as it has it."""
        global in_flight
        with state:
            in_flight -= self.is_in_flight
            self.is_in_flight = False

    def answer(self, body, key, failure):
        if failure == "drop":
            self.close_connection = True
        elif failure == "silent":
            threading.Event().wait()
        elif failure:
            self.send(int(failure), {"error": {"message": "failing as told"}}, {"Retry-After": "0"})
        elif options.key and key != options.key:
            self.send(401, {"error": {"message": "wrong key"}})
        elif options.reply is not None:
            self.send(200, options.reply)
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            number = hold() if options.hold else None
            choice = complete(body) if self.path == "/v1/completions" else chat(body)
            self.send(200, {"object": "list", "model": body["model"] if "model" in body else "", "choices": [choice]})
            if number is not None:
                let_others_go(number)
        else:
            self.send(404, {"error": {"message": f"no such path: {self.path}"}})

    def send(self, status, reply, headers=None):
        text = reply if isinstance(reply, str) else json.dumps(reply)
        data = text.encode()
        self.leave()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


ThreadingHTTPServer.daemon_threads = True
ThreadingHTTPServer.request_queue_size = 64
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
