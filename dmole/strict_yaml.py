# SPDX-License-Identifier: Apache-2.0
"""The one YAML reader: mappings with text keys, lists, and scalars that mean one thing only.

YAML 1.1 reads `1:30` as 90, `017` as 15, `1_000` as 1000 and `on` as true; here each is the text that is written.
Plain scalars are null (`null`, `~`, nothing), `true` or `false`, a decimal number (YAML 1.2's core schema without other
bases), or text. What makes reading slow, deep or ambiguous is refused with its line: keys given twice, keys that are no
scalars, tags, anchors, nesting beyond `DEEPEST`, integers beyond 64 bits, half surrogate pairs.
"""

import re
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 50
LONGEST = 2**20
_NULL = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        for given, what in (
            (isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None), "an anchor or alias; write it out"),
            (getattr(event, "tag", None), "a tag; expected plain YAML without tags"),
            (self.depth >= DEEPEST, f"nesting deeper than {DEEPEST}; expected flat settings"),
        ):
            if given:
                raise _error(f"holds {what}", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of the one document in `text`, with their lines; None if it holds none.

    Raises yaml.YAMLError for what is no YAML and for tags, anchors, deep nesting and half surrogate pairs.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"holds {len(text)} characters; expected at most {LONGEST}")
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
    # PyYAML's own slips on damaged escapes (`"\UFFFFFFFF"`) and deep indentation.
    except (ValueError, OverflowError, IndexError, RecursionError) as error:
        raise yaml.YAMLError(f"cannot be read ({type(error).__name__}: {error})") from error
    finally:
        loader.dispose()
    if node is not None:
        _join_surrogates(node)
    return node


def load_yaml(text: str) -> Any:
    """The value of `text`: dict with text keys, list, str, int, float, bool or None. Raises yaml.YAMLError."""
    node = compose_yaml(text)
    return None if node is None else _value(node)


def read_yaml(path: Path) -> Any:
    """The value of a UTF-8 file. Raises yaml.YAMLError, OSError."""
    try:
        return load_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("has a key that is a list or a mapping; expected a name", key)
            if key.value in found:
                raise _error(f"key {key.value!r} is given twice", key)
            found[key.value] = _value(value)
        return found
    text = str(node.value)
    if getattr(node, "style", None) is not None:  # quoted, or a block of text
        return text
    if text in _NULL:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise _error(f"holds an integer of {len(text.lstrip('+-'))} digits; expected one of 64 bits", node)
        return int(text)
    if _FLOAT.fullmatch(text) or text.lower() in _SPECIAL:
        return float(_SPECIAL.get(text.lower(), text))
    return text


def _join_surrogates(node: yaml.Node) -> None:
    """JSON writes U+1F600 as two escapes, which PyYAML reads as two halves."""
    if isinstance(node, yaml.ScalarNode):
        try:
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise _error("holds half of a surrogate pair; expected whole characters", node) from error
        return
    for item in node.value:
        for inner in item if isinstance(item, tuple) else (item,):
            _join_surrogates(inner)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
