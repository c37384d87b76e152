"""What the runner of blocks makes of pages that are wrong, and of pages that are right."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from docs.blocks import PageError, blocks_of
from docs.command import read_line
from docs.runner import LIMIT, PageFailed

PAGE = """# A page

```bash
online-dpo --version
```

- in a list

  ```python title="own/reward.py"
  def reward(completions):
      return [1.0 for _ in completions]
  ```

```python
number = 3
```

```python
assert number == 3
```

```text
what is printed
```

<!-- not run: it costs money -->
```bash
false
```

```yaml
beta: 0.3
```
"""


def test_blocks_have_a_line_a_language_a_title_and_a_reason():
    blocks = list(blocks_of("page.md", PAGE))
    assert [(block.line, block.language, block.title, block.reason) for block in blocks] == [
        (3, "bash", None, None),
        (9, "python", "own/reward.py", None),
        (14, "python", None, None),
        (18, "python", None, None),
        (22, "text", None, None),
        (27, "bash", None, "it costs money"),
        (31, "yaml", None, None),
    ]
    assert blocks[1].code == "def reward(completions):\n    return [1.0 for _ in completions]\n"
    assert [block.line for block in blocks if block.is_run] == [3, 9, 14, 18, 31]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```rust\nfn\n```", "page.md:1: `rust` is none of bash, python"),
        ("```\nls\n```", "page.md:1: `` is none of bash, python"),
        ("```bash\nls", "page.md:1: a fence without an end"),
        ("```bash run\nls\n```", 'title="FILE", not `bash run`'),
        ('```text title="../x"\nls\n```', "page.md:1: a title is a file of the page's own folder, not ../x"),
        ("<!-- not run -->\n```bash\nls\n```", "page.md:1: write why it is not run"),
        ("<!-- not run: -->\n```bash\nls\n```", "page.md:1: write why it is not run"),
        ("<!-- not run: no GPU -->\nwords\n```bash\nls\n```", "stands before no block"),
        ("<!-- not run: no GPU -->", "stands before no block"),
    ],
)
def test_a_page_that_does_not_keep_to_the_convention(text, said):
    with pytest.raises(PageError) as error:
        list(blocks_of("page.md", text))
    assert said in str(error.value)


def test_a_page_that_is_right(stage, tmp_path):
    assert stage.run_page("page.md", tmp_path / "page", PAGE) == 5


MISSPELT = "jduge"
WRONG = {
    "a command": ("```bash\necho before\nfalse\n```", "page.md:1: exit code 1", "+ false"),
    "a command of ours": ("```bash\nonline-dpo tarin run.yaml\n```", "page.md:1: exit code 2", "Did you mean `train`?"),
    "a pipe": ("```bash\nfalse | cat\n```", "page.md:1: exit code 1", ""),
    "a script": (
        '```bash title="job.sh"\nif true; then\n```',
        "page.md:1: exit code 2",
        "job.sh: line 2: syntax error",
    ),
    "python": ("\n```python\n1 / 0\n```", "page.md:2: an exception", 'File "page.md", line 3'),
    "the end of Python": ("```python\nimport os\nos._exit(0)\n```", "page.md:1: it has ended Python with", ""),
    "a file in Python": ('```python title="x.py"\nimport nothing_like_it\n```', "exit code 1", "nothing_like_it"),
    "a key": ("```yaml\nbetta: 0.3\n```", "page.md:1: the fragment is wrong", "Did you mean `beta`?"),
    "a value": ("```yaml\nnum_completions: many\n```", "page.md:1: the fragment is wrong", "num_completions"),
    "in the background": (
        "```bash\nonline-dpo tarin & wait\n```",
        "page.md:1: what it does not look at",
        "exit code 2",
    ),
    "a fragment": ("```yaml\n- 1\n```", "page.md:1: a fragment of a run file has keys", ""),
    "json": ("```json\n{1}\n```", "page.md:1: no json", ""),
    "an extra": (f"```bash\npip install '.[{MISSPELT}]'\n```", "exit code 2", f"there is no extra {MISSPELT}"),
    "a package": ("```bash\npip install onlin-dpo\n```", "exit code 2", "neither this package nor"),
    "a target": ("```bash\nmake tset\n```", "exit code 2", "make has no target tset"),
    "a dashboard": ("```bash\nonline-dpo dashboard runs/nothing\n```", "exit code 2", "there is no folder"),
}


def test_a_block_that_hangs_is_ended(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("docs.runner.LIMIT", 1.0)
    text = """```bash
sleep 1000
```\n```python
import os
open("pid", "w").write(str(os.getpid()))
while True: pass
```"""
    with pytest.raises(PageFailed) as error:
        stage.run_page("page.md", tmp_path / "page", text)
    assert str(error.value).count("not at an end after 1 s") == 2
    file = tmp_path / "page/pid"
    if pid := file.read_text() if file.is_file() else "":  # it came so far
        wait_until(lambda: not Path("/proc", pid).exists())


def test_a_client_that_says_nothing_holds_nobody_up(stage, tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(stage.warm))
        pid = read_line(silent)
        assert stage.run_page("page.md", tmp_path / "page", "```bash\nonline-dpo --version\n```") == 1
        assert Path("/proc", pid).exists()
    wait_until(lambda: not Path("/proc", pid).exists())


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kind", WRONG)
def test_a_block_that_is_wrong(stage, tmp_path, kind):
    text, said, printed = WRONG[kind]
    with pytest.raises(PageFailed) as error:
        stage.run_page("page.md", tmp_path / "page", text)
    assert said in str(error.value) and printed in str(error.value)
