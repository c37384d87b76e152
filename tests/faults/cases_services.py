"""Services that rewards and judges ask over HTTP: dead, slow, endless, hostile; their keys; a judge's cache."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from faults.harness import ANY, Fault, OneLine, Survived, scorer

SERVER = """
import gzip, http.server, json, re, threading, time
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        global asked
        asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self.respond(asked, body)
        except OSError:
            self.close_connection = True
    def send(self, data, status=200, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def endless(self, piece, pause=0.0):
        self.wfile.write(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
        while True:
            self.wfile.write(piece)
            time.sleep(pause)
    def log_message(self, *a):
        pass
    def respond(self, number, body):
        RESPOND
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *a):
        pass
server = Server(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}/v1"
"""
REWARD = """
from online_dpo.scoring import HTTPReward
words = HTTPReward(ADDRESS, "words", attempts=2, timeout=0.5, max_failure_share=SHARE)
"""
JUDGE = """
from online_dpo.scoring import LLMJudge
settings = dict(base_url=address, cache=CACHE, attempts=2, request_timeout=0.5, concurrency=2, order="given")
judge = LLMJudge(model="m", **settings)
"""
RIGHT = "self.send({'scores': right(body['completions'])})"
LETTER = """
question = body["messages"][0]["content"]
first, second = (re.search(rf"<<<ANSWER {x} (\\w+)\\n(.*?)\\nANSWER {x} \\1>>>", question, re.S)[2] for x in "AB")
letter = "A" if right([first]) >= right([second]) else "B"
answer = {"choices": [{"message": {"content": letter}}]}
"""
MANY = {"per_device_train_batch_size": 8, "num_completions": 8, "max_steps": 2}
"""So many questions in the first step that the share of failures stops the run there."""
BY_JUDGE = {"reward_funcs": None, "judge": "feedback.py:judge"}


def service(respond: str, address: str = "address", share: float = 0.2) -> dict[str, str | bytes]:
    """A feedback.py whose `words` asks a service, which ``respond``s."""
    indented = "\n        ".join(respond.strip().splitlines())
    reward = REWARD.replace("ADDRESS", address).replace("SHARE", str(share))
    return {"feedback.py": scorer() + SERVER.replace("RESPOND", indented) + reward}


def judge(respond: str, cache: str = "None") -> dict[str, str | bytes]:
    """A feedback.py whose `judge` asks an endpoint, which ``respond``s; ``answer`` is a right answer."""
    indented = "\n        ".join((LETTER + respond).strip().splitlines())
    return {"feedback.py": scorer() + SERVER.replace("RESPOND", indented) + JUDGE.replace("CACHE", cache)}


STOPS = ("`words`", "gave no usable answer", "Last cause")
HOSTILE = {
    "no JSON": ("self.send(b'<html>It works!</html>')", "no JSON"),
    "nothing": ("self.send(b'')", "the answer is empty"),
    "nested 20,000 deep": ("""self.send(b'{"scores": ' + b'[' * 20000 + b']' * 20000 + b'}')""", "nested too deeply"),
    "invalid UTF-8": ("""self.send(b'{"scores": ["\\xff"]}')""", "decode"),
    "a key twice": ("""self.send(b'{"scores": [1], "scores": [2]}')""", "stands twice"),
    "a list": ("self.send([1.0])", "the answer is list"),
    "too few scores": ("self.send({'scores': [1.0]})", "1 scores for"),
    "10**400": ("self.send(json.dumps({'scores': [10**400] * len(body['completions'])}).encode())", "a finite number"),
    "1e999": ("""self.send(b'{"scores": [' + b', '.join([b'1e999'] * len(body['completions'])) + b']}')""", "finite"),
    "NaN": ("self.send({'scores': [float('nan')] * len(body['completions'])})", "a finite number"),
    "true": ("self.send({'scores': [True] * len(body['completions'])})", "a finite number"),
    "texts": ("self.send({'scores': ['1.0'] * len(body['completions'])})", "a finite number"),
    "without end": ("self.endless(b'x' * 65536)", "the answer is longer than"),
    "a byte at a time": ("self.endless(b' ', 0.05)", "no whole answer within `timeout`"),
    "never": ("time.sleep(30)", "no whole answer within `timeout`"),
    "a gzip bomb": ("self.send(gzip.compress(b' ' * 10**7), Content_Encoding='gzip')", "the answer is compressed"),
    "500": ("self.send('no', 500)", "status 500"),
    "422": ("self.send('no', 422)", "status 422"),
    "control characters": ("self.send(b'\\x1b[2J\\x1b]0;x\\x07gone', 400)", "status 400: gone"),
    "closes the connection": ("self.connection.close()", "Last cause"),
}
REFUSES = {
    "401": ("self.send('bad key', 401)", "refuses to score"),
    "404": ("self.send('nothing here', 404)", "refuses to score"),
    "a redirect": (
        "self.send('', 307, Location='http://127.0.0.1:9/?token=sk-0')",
        "http://127.0.0.1:9/, which is not",
    ),
    "a redirect to itself": ("self.send('', 301, Location='/v1')", "a redirect to /v1, which is not followed"),
}
PASSES = {
    "503 once": "self.send('no', 503) if number == 1 else " + RIGHT,
    "no JSON once": "self.send(b'<html>') if number == 1 else " + RIGHT,
    "late once": "time.sleep(0.7) if number == 1 else None\n" + RIGHT,
    "a byte order mark": "self.send(b'\\xef\\xbb\\xbf' + json.dumps({'scores': right(body['completions'])}).encode())",
    "Retry-After of 30 years": "self.send('', 503, Retry_After='1000000000') if number == 1 else " + RIGHT,
}
URLS = {
    "a password in the address": "'http://me:sk-0@127.0.0.1/'",
    "a key in the address": "address + '?api_key=sk-0'",
    "no address": "'127.0.0.1:80'",
}

JUDGE_FAILS = {
    "without end": ("self.endless(b'x' * 65536)", "the answer is longer than"),
    "nested 20,000 deep": ("self.send(b'[' * 20000 + b']' * 20000)", "no chat completion"),
    "content is a list": ("answer['choices'][0]['message']['content'] = [1]\nself.send(answer)", "no chat completion"),
    "no verdict": ("answer['choices'][0]['message']['content'] = 'Both.'\nself.send(answer)", "no verdict in 'Both.'"),
    "500": ("self.send('no', 500)", "status 500"),
}


def no_database(folder: Path) -> None:
    (folder / "cache.sqlite3").write_text("something else" * 200)


def another_version(folder: Path) -> None:
    with sqlite3.connect(folder / "cache.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 9")
        connection.execute("CREATE TABLE answers (x)")


def a_folder(folder: Path) -> None:
    (folder / "cache.sqlite3").mkdir()


FAULTS = [
    Fault("service", "none", Survived(), files=service(RIGHT)),
    *(Fault("service", f"answers {n}", OneLine(1, *STOPS, w), MANY, service(r)) for n, (r, w) in HOSTILE.items()),
    *(Fault("service", f"answers {n}", OneLine(1, w), files=service(r)) for n, (r, w) in REFUSES.items()),
    *(Fault("service", f"answers {n}", Survived(), files=service(r)) for n, r in PASSES.items()),
    *(Fault("service", n, OneLine(2, "A reward's address"), files=service(RIGHT, url)) for n, url in URLS.items()),
    Fault(
        "service",
        "does not listen",
        OneLine(1, *STOPS, "Connect"),
        options=MANY,
        files=service(RIGHT, "'http://127.0.0.1:9/v1'"),
    ),
    Fault("judge", "none", Survived(like=ANY), options=BY_JUDGE, files=judge("self.send(answer)")),
    *(
        Fault("judge", f"answers {n}", OneLine(1, "gave no usable answer", w), BY_JUDGE | MANY, judge(r))
        for n, (r, w) in JUDGE_FAILS.items()
    ),
    Fault(
        "judge",
        "answers 401",
        OneLine(1, "refuses to judge"),
        options=BY_JUDGE,
        files=judge("self.send('bad key', 401)"),
    ),
    Fault(
        "judge",
        "answers a redirect",
        OneLine(1, "a redirect to http://127.0.0.1:9/x, which is not followed"),
        options=BY_JUDGE,
        files=judge("self.send('', 307, Location='http://127.0.0.1:9/x?key=sk-0')"),
    ),
    *(
        Fault(
            "judge",
            f"its cache is {prepare.__name__.replace('_', ' ')}",
            Survived("`cache`", "The run goes on", like=ANY),
            options=BY_JUDGE,
            files=judge("self.send(answer)", "'cache.sqlite3'"),
            prepare=prepare,
        )
        for prepare in (no_database, another_version, a_folder)
    ),
    Fault(
        "judge",
        "its cache is removed in mid run",
        Survived("`cache`", "nothing more can be written", like=ANY),
        options=BY_JUDGE,
        files=judge(
            "os.path.exists('cache.sqlite3') and os.remove('cache.sqlite3')\nself.send(answer)", "'cache.sqlite3'"
        ),
    ),
    Fault(
        "run file",
        "a key in an address",
        OneLine(2, "`judge_kwargs` holds an address with a user name, a password or a key"),
        options={
            "reward_funcs": None,
            "judge": "llm",
            "judge_kwargs": {"model": "m", "base_url": "http://a:sk-0@b/v1"},
        },
    ),
    Fault(
        "run file",
        "a key in place of a variable",
        OneLine(2, "`api_key_env` is not the name of an environment variable"),
        options={"reward_funcs": None, "judge": "llm", "judge_kwargs": {"model": "m", "api_key_env": "sk-0-1"}},
    ),
]
