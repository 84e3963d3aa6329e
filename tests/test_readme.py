"""The example in the README runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_example():
    (example,) = re.findall("```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    optimizer = names["optimizer"]
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
