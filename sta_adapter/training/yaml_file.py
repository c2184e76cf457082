"""YAML as settings are written in it: safe, and no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sta_adapter._lazy import importing
from sta_adapter.errors import ConfigError

if TYPE_CHECKING:
    import yaml


def read_yaml(path: str | Path) -> dict[str, object]:
    """A mapping from a YAML file."""
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the settings in {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:500]}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected lines like 'learning_rate: 1.0e-4'.")
    return values


def parse_yaml(text: str) -> object:
    """What a text says; a ValueError where it is no YAML."""
    with importing("reading YAML needs PyYAML: pip install 'sta-adapter[train]'."):
        import yaml

    class SingleKeys(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML would take the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{twice!r} stands twice in it, line {node.start_mark.line + 1} and after")
            found: dict[object, object] = super().construct_mapping(node, deep)
            return found

    try:
        return yaml.load(text, SingleKeys)
    except (yaml.YAMLError, RecursionError) as error:  # bad dates and numbers of thousands of digits are ValueErrors
        raise ValueError(str(error)) from error
