"""Pages for people who vote: blind, the questions of a waiting trainer first; and what agrees with their votes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from online_dpo.dashboard.catalog import Run
from online_dpo.dashboard.context import render, run_of
from online_dpo.dashboard.group import Group, Message
from online_dpo.dashboard.pages.pairs import PATIENCE
from online_dpo.runs.agreement import agreements
from online_dpo.runs.questions import Question, asked, questions_of, waiting
from online_dpo.runs.shared_lines import jsonl
from online_dpo.runs.votes import CHOICES, Choice, Prompt, Vote, add_vote, votes_as_pairs, votes_of

LOOKED_AT = 20
"""Groups that are read to find one on which there is no vote yet."""

LONGEST_THOUGHT = 3600.0
"""Seconds after which a person has probably done something else meanwhile."""


@dataclass(frozen=True)
class Open:
    """What a person is asked next. ``form`` names it; ``until`` is when a trainer goes on without an answer."""

    messages: tuple[Message, ...]
    first: str
    second: str
    form: Mapping[str, str]
    until: float | None = None


def show_vote(request: Request) -> Response:
    """The next question."""
    run = run_of(request)
    votes, now = votes_of(run.folder.path), time.time()
    open_questions = waiting(questions_of(run.folder.path).values(), votes, now)
    is_asked = bool(open_questions) or run.folder.settings.get("judge") == "human"
    run.index.refresh_samples(PATIENCE)
    progress = run.index.progress
    one = _of_trainer(open_questions[0]) if open_questions else None if is_asked else _of_samples(run, votes)
    return render(
        *(request, "vote.html"),
        page="vote",
        **{"run": run, "one": one, "now": now, "waiting": len(open_questions), "is_asked": is_asked},
        **{"votes": sum(vote.choice != "skip" for vote in votes.values()), "pairs": _paired_groups(run)},
        progress=progress,
    )


async def take_vote(request: Request) -> Response:
    """Keep a vote, and lead to the next question."""
    form = dict(parse_qsl((await request.body()).decode("utf-8", "replace"), keep_blank_values=True))
    return await run_in_threadpool(_take, request, form)


def _take(request: Request, form: Mapping[str, str]) -> Response:
    run = run_of(request)
    choice = form.get("choice", "")
    if choice not in CHOICES:
        raise HTTPException(400, "This vote names no choice.")
    is_open = form.get("open") == "1"
    vote = _vote(run, form, cast(Choice, choice), blind=not is_open)
    try:
        add_vote(run.folder.path, vote)
    except OSError as error:
        raise HTTPException(500, f"The vote cannot be kept: {error.strerror or error}.") from error
    if is_open:
        return HTMLResponse('<span class="said small" role="status">Kept in votes.jsonl.</span>')
    return RedirectResponse(f"/runs/{run.id}/vote", status_code=303)


def _vote(run: Run, form: Mapping[str, str], choice: Choice, *, blind: bool) -> Vote:
    """The vote of a form, with the texts as they stand in the run's folder."""
    now = time.time()
    since = form.get("since", "")
    seconds = now - float(since) if since.replace(".", "", 1).isdecimal() and len(since) < 20 else None
    seconds = round(seconds, 1) if seconds is not None and 0 <= seconds <= LONGEST_THOUGHT else None
    if "question" in form:
        question = questions_of(run.folder.path).get(form["question"])
        if question is None:
            raise HTTPException(404, "The trainer does not ask this any more.")
        return Vote(question.prompt, question.first, question.second, choice, now, seconds, blind=blind)
    group = run.index.find_group(form.get("group", ""))
    places = [int(part) for part in form.get("completions", "").split("-") if part.isdecimal() and len(part) < 6]
    if group is None or len(places) != 2 or max(places) >= len(group.completions):
        raise HTTPException(404, "The folder of this run has no such answers any more.")
    first, second = (group.completions[place].text for place in places)
    shown = (places[0], places[1])
    return Vote(plain_prompt(group), first, second, choice, now, seconds, group.key, shown, blind)


def _of_trainer(question: Question) -> Open:
    prompt = question.prompt
    spoken = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = tuple(Message(str(one.get("role", "")), str(one.get("content", ""))) for one in spoken)
    return Open(messages, question.first, question.second, {"question": question.id}, question.until)


def _of_samples(run: Run, votes: Mapping[str, Vote]) -> Open | None:
    """A pair of the run on which there is no vote yet, in an order that looks random."""
    voted = {vote.group for vote in votes.values()}
    with run.index.reading() as db:
        rows = db.execute(
            "SELECT id, step || '-' || rank || '-' || idx || '-' || round AS key,"
            " prompt_key || min(chosen, rejected) || char(10) || max(chosen, rejected) AS texts"
            " FROM sample WHERE pairs > 0 ORDER BY (id * 2654435761) % 4294967296"
        ).fetchall()
    # groups that begin as one on which there is a vote come last: they may well be the same question
    known = {row["texts"] for row in rows if row["key"] in voted}
    left = sorted((row for row in rows if row["key"] not in voted), key=lambda row: row["texts"] in known)
    for row in left[:LOOKED_AT]:
        group = run.index.group(row["id"])
        if group is not None and group.pairs and (one := _of_pair(group, votes)) is not None:
            return one
    return None


def _of_pair(group: Group, votes: Mapping[str, Vote]) -> Open | None:
    """The question about the first pair of a group; ``None`` where there is a vote on the same texts."""
    places = (group.pairs[0].chosen, group.pairs[0].rejected)
    texts = {group.completions[place].text: place for place in places}
    if len(texts) < 2:
        return None
    question = asked(plain_prompt(group), *texts, seed=0, time=0.0, until=0.0)
    if question.id in votes:
        return None
    shown = f"{texts[question.first]}-{texts[question.second]}"
    return Open(group.prompt, question.first, question.second, {"group": group.key, "completions": shown})


def plain_prompt(group: Group) -> Prompt:
    """The prompt of a group as votes keep it."""
    if len(group.prompt) == 1 and not group.prompt[0].role:
        return group.prompt[0].content
    return [{"role": message.role, "content": message.content} for message in group.prompt]


def _paired_groups(run: Run) -> int:
    with run.index.reading() as db:
        return db.execute("SELECT count(*) FROM sample WHERE pairs > 0").fetchone()[0]


def show_agreement(request: Request) -> Response:
    """How often scorers, judge and labels agree with the person."""
    run = run_of(request)
    run.index.refresh_samples(PATIENCE)
    votes = votes_of(run.folder.path)
    found = agreements(votes.values(), lambda vote: _row(run, vote))
    told = [vote for vote in votes.values() if vote.choice != "skip"]
    seconds = sorted(vote.seconds for vote in told if vote.seconds is not None)
    return render(
        *(request, "agreement.html"),
        page="vote",
        **{"run": run, "agreements": sorted(found, key=lambda one: -one.share), "votes": len(told)},
        **{"ties": sum(vote.choice == "tie" for vote in told), "skipped": len(votes) - len(told)},
        seconds=seconds[len(seconds) // 2] if seconds else None,
    )


def _row(run: Run, vote: Vote) -> Mapping[str, object] | None:
    group = None if vote.group is None else run.index.find_group(vote.group)
    return None if group is None else asdict(group)


def export_votes(request: Request) -> Response:
    """The votes as a file for ``online-dpo judge``."""
    run = run_of(request)
    name = f"votes-{Path(run.id).name}.jsonl"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(jsonl(votes_as_pairs(run.folder.path)), media_type="application/x-ndjson", headers=headers)


ROUTES = [
    Route("/runs/{run}/vote", show_vote),
    Route("/runs/{run}/vote", take_vote, methods=["POST"]),
    Route("/runs/{run}/vote/agreement", show_agreement),
    Route("/runs/{run}/votes.jsonl", export_votes),
]
