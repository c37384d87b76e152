"""Pages of samples: the list of groups with its filters, one group, and a prompt over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from online_dpo.dashboard.catalog import Run
from online_dpo.dashboard.context import render, run_of
from online_dpo.dashboard.group import Completion, Group, Pair
from online_dpo.dashboard.plain_words import ratio_class, why_left_out, why_no_pair
from online_dpo.dashboard.same_prompts import best
from online_dpo.dashboard.sample_query import PAGE, SORTS, SampleQuery
from online_dpo.dashboard.word_difference import MOST_WORK, Segment, word_difference

PATIENCE = 0.1
"""Seconds in which a page reads new groups before it shows what it has."""

DIFFERENCE = "difference"
VIEWS = {DIFFERENCE: "Difference", "tokens": "Tokens", "text": "Text"}
PAGE_WORK = 5 * MOST_WORK
"""As `MOST_WORK`, for all pairs of a group together: there may be a hundred."""

EARLIEST = 20
"""Groups of a prompt that the page of the prompt shows whole."""


def show_pairs(request: Request) -> Response:
    """The list of groups."""
    run, query = run_of(request), SampleQuery.read(request.query_params)
    run.index.refresh_samples(PATIENCE)
    progress = run.index.progress
    with run.index.reading() as db:
        count, rows = query.count(db), query.rows(db)
        total = db.execute("SELECT count(*) FROM sample").fetchone()[0]
        reasons = [row[0] for row in db.execute("SELECT DISTINCT reason FROM sample WHERE reason > '' ORDER BY 1")]
        scorers = [row[0] for row in db.execute("SELECT DISTINCT scorer FROM reward ORDER BY 1 LIMIT 100")]
    page = render(
        *(request, "pairs.html"),
        page="pairs",
        **{"run": run, "query": query, "rows": rows, "count": count, "total": total},
        **{"reasons": reasons, "scorers": scorers, "sorts": SORTS, "pages": -(-count // PAGE)},
        progress=progress,
    )
    if request.headers.get("hx-trigger") == "filters":  # the address without the fields that are empty
        page.headers["hx-push-url"] = f"/runs/{run.id}/pairs?{query.link(page='')}"
    return page


def show_group(request: Request) -> Response:
    """One group: its prompt, its completions, and what was made of them."""
    run, query = run_of(request), SampleQuery.read(request.query_params)
    group = _group_of(run, request.path_params["key"])
    given = request.query_params.get("view", "")
    view = given if given in VIEWS else DIFFERENCE
    with run.index.reading() as db:
        neighbours = query.neighbours(db, group.key)
        others = db.execute(
            "SELECT count(*), min(step), max(step) FROM sample WHERE prompt_key = ?", [group.prompt_key]
        ).fetchone()
    return render(
        *(request, "group.html"),
        page="pairs",
        **{"run": run, "query": query, "group": group, "neighbours": neighbours, "others": tuple(others)},
        **{"pairs": shown_pairs(group, view), "view": view},
        **{"views": VIEWS, "ratio_class": ratio_class, "why": why_no_pair(group.reason, group.resampled_for)},
        left_out=[why_left_out(reason, count) for reason, count in group.left_out.items()],
        roles=_roles(group),
    )


def show_prompt(request: Request) -> Response:
    """A prompt over the steps: its answers at each, against its earliest ones."""
    run, key = run_of(request), request.path_params["prompt"]
    run.index.refresh_samples(PATIENCE)
    with run.index.reading() as db:
        rows = db.execute("SELECT * FROM sample WHERE prompt_key = ? ORDER BY step, rank, idx, round", [key]).fetchall()
    if not rows:
        raise HTTPException(404, "There is no such prompt among the groups of this run.")
    kept = rows if len(rows) <= EARLIEST else [*rows[: EARLIEST // 2], *rows[-EARLIEST // 2 :]]
    groups = [group for row in kept if (group := run.index.group(row["id"])) and group.completions]
    if not groups:
        raise HTTPException(404, "The groups of this prompt are not in the folder any more.")
    return render(
        *(request, "prompt.html"),
        page="pairs",
        **{"run": run, "rows": rows, "kept": len(kept), "first": groups[0]},
        answers=[_against(groups[0], group) for group in groups],
    )


@dataclass(frozen=True)
class ShownPair:
    """A pair as a page shows it: both completions, and where their texts differ."""

    pair: Pair
    chosen: Completion
    rejected: Completion
    chosen_words: Sequence[Segment]
    rejected_words: Sequence[Segment]


def shown_pairs(group: Group, view: str) -> list[ShownPair]:
    """The pairs of a group; with the difference of their texts in the view that shows it."""
    work = min(MOST_WORK, PAGE_WORK // max(1, len(group.pairs))) if view == DIFFERENCE else 0
    return [_shown_pair(group, pair, work) for pair in group.pairs]


def _shown_pair(group: Group, pair: Pair, most_work: int) -> ShownPair:
    chosen, rejected = group.completions[pair.chosen], group.completions[pair.rejected]
    return ShownPair(pair, chosen, rejected, *word_difference(chosen.text, rejected.text, most_work))


@dataclass(frozen=True)
class ShownAnswer:
    """The answer of a group that is shown for it, and where it differs from the earliest one."""

    group: Group
    answer: Completion
    words: Sequence[Segment]
    is_first: bool


def _against(first: Group, group: Group) -> ShownAnswer:
    answer, earliest = best(group), best(first)
    is_first = group.key == first.key
    words = [Segment(answer.text, False)] if is_first else word_difference(answer.text, earliest.text)[0]
    return ShownAnswer(group, answer, words, is_first)


def _roles(group: Group) -> dict[int, str]:
    """``chosen``, ``rejected`` or both, for the completions of pairs."""
    chosen, rejected = {pair.chosen for pair in group.pairs}, {pair.rejected for pair in group.pairs}
    both = {place: "both" for place in chosen & rejected}
    return dict.fromkeys(chosen, "chosen") | dict.fromkeys(rejected, "rejected") | both


def _group_of(run: Run, key: str) -> Group:
    group = run.index.find_group(key)
    if group is None:  # it may just have been written
        run.index.refresh_samples(PATIENCE)
        group = run.index.find_group(key)
    if group is None or not group.completions:
        raise HTTPException(404, "There is no such group in the folder of this run: it was never written, or removed.")
    return group


ROUTES = [
    Route("/runs/{run}/pairs", show_pairs),
    Route("/runs/{run}/pairs/{key}", show_group),
    Route("/runs/{run}/prompts/{prompt}", show_prompt),
]
