"""Pages of runs: what they show, and that damaged and hostile folders do no harm."""

import json
import os
import shutil

import pytest
import run_folders

from online_dpo.dashboard import catalog
from online_dpo.dashboard.metric_groups import group_of, grouped
from online_dpo.dashboard.settings import compared, flat
from online_dpo.runs.reading import RunFolder

PAGES = (
    "",
    "/charts",
    "/series?metric=loss",
    "/marks",
    "/settings",
    "/environment",
    "/events",
    "/pairs",
    "/judge",
    "/vote",
)


def test_all_runs_are_in_the_table_with_their_last_metrics(made, opened):
    client = opened(made)
    page = client.get("/runs").text
    rows = [json.loads(line) for line in (made / "scored" / "metrics.jsonl").open()]
    assert page.count("<tbody>") == 1 and 'id="run-' in page
    assert f"{rows[-1]['loss']:#.4g}" in page and "30" in page
    assert "finished" in page and "<polyline" in page


def test_the_table_is_sorted_and_what_has_no_value_stands_last(tmp_path, opened):
    for name, rows in (("short", 3), ("long", 9), ("middle", 6)):
        run_folders.make(tmp_path / name, rows, 3, seed=rows)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    client = opened(tmp_path)

    def names(query):
        page = client.get(f"/runs?{query}").text
        there = [name for name in ("short", "long", "middle", "empty") if f">{name}</a>" in page]
        return sorted(there, key=lambda name: page.index(f">{name}</a>"))

    assert names("sort=step") == ["short", "middle", "long", "empty"]
    assert names("sort=-step") == ["long", "middle", "short", "empty"]
    assert names("sort=name") == ["empty", "long", "middle", "short"]
    assert names("sort=nonsense") and names("q=MID") == ["middle"]


def test_a_long_run_is_summed_up_from_a_few_of_its_rows(tmp_path, opened):
    folder = run_folders.make(tmp_path / "long", 3000, 3, seed=0, state="running")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines.insert(2900, json.dumps({"step": 2900, "kind": "eval", "eval_win_rate": 0.625}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 3001, "loss": 99')
    [run] = opened(tmp_path).dashboard.catalog.runs()
    summary, last = run.summarizer.summary(), json.loads(lines[-1])
    assert summary.step == summary.steps == 3000 and summary.last["loss"] == last["loss"]
    assert summary.last["eval_win_rate"] == 0.625
    assert summary.seconds == pytest.approx(10 * 2999)
    steps = [step for step, _ in summary.trend]
    assert steps[0] == 1 and steps[-1] == 3000 and 20 <= len(steps) <= 30 and steps == sorted(steps)


def test_series_are_what_was_logged(made, opened):
    client = opened(made)
    rows = [json.loads(line) for line in (made / "scored" / "metrics.jsonl").open()]
    answer = client.get(f"/runs/{client.run_id('scored')}/series?metric=loss&metric=nothing&smoothing=0.5").json()
    steps, values = answer["series"]["loss"]["raw"]
    assert steps == [row["step"] for row in rows]
    assert values == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    average = rows[0]["loss"]
    for row in rows:
        average = 0.5 * average + 0.5 * row["loss"]
    assert answer["series"]["loss"]["average"] == pytest.approx(average)
    assert answer["series"]["nothing"]["raw"] == [[], []]
    part = client.get(f"/runs/{client.run_id('scored')}/series?metric=loss&from=10&to=12").json()
    assert part["series"]["loss"]["raw"][0] == [9, 10, 11, 12, 13]


@pytest.mark.parametrize("query", ["points=x", "points=-1", "points=1e999", "from=nan", "smoothing=2", "smoothing=inf"])
def test_odd_queries_are_answered(made, opened, query):
    client = opened(made)
    assert client.get(f"/runs/{client.run_id('scored')}/series?metric=loss&{query}").status_code == 200


def test_new_rows_come_as_events(tmp_path, opened):
    folder = run_folders.make(tmp_path / "live", 5, 5, seed=0, state="running")
    client = opened(tmp_path)
    from online_dpo.dashboard.pages.live import Follower

    run = client.dashboard.catalog.find(client.run_id("live"))
    follower = Follower(run, "0:0")
    first = dict(follower.news())
    assert first["rows"]["series"]["loss"][0] == [1, 2, 3, 4, 5]
    assert follower.news() == []
    run_folders.append_step(folder, 6, 6)
    news = dict(follower.news())
    assert news["rows"]["series"]["loss"][0] == [6] and news["samples"]["run"] == run.id
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:2]))  # it was resumed from step 2
    names = [name for _ in range(3) for name, _ in follower.news()]
    assert "reload" in names


def test_an_error_is_a_page_of_one_sentence(made, opened):
    client = opened(made)
    for path in ("/runs/none", "/runs/none/series", "/nothing", "/overlay", "/compare?run=none"):
        answer = client.get(path)
        assert answer.status_code in (400, 404) and 'role="alert"' in answer.text, path


def hostile(folder):
    """A run folder by somebody who means ill."""
    text = "<script>alert(1)</script>"
    folder.mkdir(parents=True)
    deep = "[" * 900 + "]" * 900
    (folder / "metrics.jsonl").write_text(
        "\n".join(
            [
                json.dumps({"step": 1, text: 1.0, "loss": 1e308, "x" * 5000: 1.0, "big": 10**400}),
                json.dumps({f"name{n}": n for n in range(5000)} | {"step": 2}),
                f'{{"step": 3, "loss": {deep}}}',
                '{"step": 9999999999999999999999, "loss": 1}',
                json.dumps({"step": 4, "loss": -1e308, "time": 1e300}),
                "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
            ]
        )
        + "\n"
    )
    events = [
        {"time": "now", "step": text, "kind": [text], "message": {"a": text}},
        {"kind": "start", "pid": text, "host": [], "process_started": {}},
        {"kind": "end", "state": text, "rank": 0, "step": -5, "time": -1e300},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events) + f'{{"x": {deep}}}\n')
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    (folder / "run.yaml").write_text(f"model_name_or_path: '{text}'\nmax_steps: {text}\n{laughs}")
    (folder / "environment.json").write_text(json.dumps({"sessions": [{text: text}, 3, None]}))
    (folder / "completions-r0-00000.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + os.urandom(500))
    (folder / "completions-r1-00000.jsonl.zst").symlink_to("/dev/zero")


@pytest.mark.parametrize("page", PAGES)
def test_a_hostile_folder_does_no_harm(tmp_path, opened, page):
    hostile(tmp_path / "<i>bad")
    (tmp_path / "round").symlink_to(tmp_path)
    client = opened(tmp_path)
    answer = client.get(f"/runs/{client.run_id('<i>bad')}{page}")
    assert answer.status_code == 200
    if "json" not in answer.headers["content-type"]:
        assert "<script>alert" not in answer.text and "<i>bad" not in answer.text
    assert len(answer.content) < 2_000_000


def test_hostile_folders_are_listed_compared_and_overlaid(tmp_path, opened):
    hostile(tmp_path / "a")
    hostile(tmp_path / "b")
    client = opened(tmp_path)
    a, b = client.run_id("a"), client.run_id("b")
    for path in ("/runs", f"/compare?run={a}&run={b}", f"/overlay?run={a}&run={b}"):
        answer = client.get(path)
        assert answer.status_code == 200 and "<script>alert" not in answer.text


def test_runs_below_are_found_and_links_and_checkpoints_are_not_entered(tmp_path, opened):
    outside = tmp_path / "outside"
    for folder in (tmp_path / "runs/a", tmp_path / "runs/sweep/b", tmp_path / "runs/a/checkpoint-10", outside):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
    (tmp_path / "runs/link").symlink_to(outside)
    client = opened(tmp_path / "runs")
    assert [run.name for run in client.dashboard.catalog.runs()] == ["a", "sweep/b"]


def test_a_run_that_was_removed_and_made_anew_is_shown(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(catalog, "FRESH", 0.0)
    run_folders.make(tmp_path / "first", 5, 5, seed=0)
    client = opened(tmp_path)
    at = f"/runs/{client.run_id('first')}"
    assert client.get(f"{at}/pairs").status_code == 200
    shutil.rmtree(tmp_path / "first")
    assert "no run yet" in client.get("/runs").text and client.get(at).status_code == 404
    run_folders.make(tmp_path / "first", 7, 9, seed=1)
    assert [client.get(f"{at}{page}").status_code for page in ("", "/pairs", "/judge", "/events")] == [200] * 4
    assert "9 groups" in client.get(f"{at}/pairs").text


def test_settings_are_flat_and_what_differs_stands_first():
    first, second = flat({"beta": 0.1, "lora": {"r": 8}, "rewards": ["a", "b"]}), flat({"beta": 0.2, "lora": {"r": 8}})
    assert first == {"beta": "0.1", "lora.r": "8", "rewards": "['a', 'b']"}
    rows = compared([first, second])
    assert [(row.name, row.values) for row in rows if not row.is_equal] == [
        ("beta", ("0.1", "0.2")),
        ("rewards", ("['a', 'b']", None)),
    ]
    assert rows[-1].name == "lora.r"


def test_metrics_stand_in_their_groups():
    expected = {
        "objective/scores": "Quality",
        "scores/helpful": "Quality",
        "objective/kl": "Divergence",
        "objective/kl_by_position/0-15": "Divergence",
        "dropped/tie": "Pairs",
        "completions/chosen_length": "Pairs",
        "completions/mean_length": "Quality",
        "perf/tokens_per_second": "Speed",
        "perf/gpu_memory": "Memory",
        "perf/gpu_utilization": "Memory",
        "eval_win_rate": "Evaluation",
        "loss": "Optimization",
        "judge/cost": "Judge",
        "my/own": "Other",
    }
    assert {name: group_of(name) for name in expected} == expected
    assert next(iter(grouped(expected).values()))[0] == "objective/scores"


def test_runs_are_compared_by_their_answers_to_the_same_prompts(made, opened):
    client = opened(made)
    for run in client.dashboard.catalog.runs():
        assert run.index.refresh_samples(20)
    page = client.get(f"/compare?run={client.run_id('scored')}&run={client.run_id('judged')}").text
    assert "learning_rate" in page or "seed" in page
    prompts = [set(), set()]
    for found, name in zip(prompts, ("scored", "judged"), strict=True):
        folder = RunFolder(made / name)
        found |= {group["prompt"] for at in folder.all_frames() for group in folder.groups(at)}
    common = prompts[0] & prompts[1]
    assert common, "the made runs have no prompt in common"
    assert page.count('aria-label="Prompt ') - page.count('aria-label="Prompt"') == min(5, len(common))
