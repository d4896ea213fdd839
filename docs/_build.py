"""What mkdocs runs: the command line's reference and a page for every public module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parent.parent
PACKAGES = ("hooks", "sae", "autointerp", "steering", "phantom")
FETCHED = re.compile(r"""<(?:link|script|img|iframe)[^>]*?(?:src|href)=["']?(https?:[^"' >]+)""")
CLI_MARK = "<!-- commands -->"


def modules(package: str) -> list[str]:
    """Dotted names of a package's public modules, the package itself first."""
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return sorted(names, key=lambda name: (name != package, name))


def commands(group: Any, path: str = "maira-sae") -> Iterator[tuple[str, Any]]:
    """Every command of a typer application, with its words."""
    for name in group.list_commands(None):
        command = group.commands[name]
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def application() -> Any:
    """The command line with every option."""
    import typer

    from maira_sae.cli import app

    return typer.main.get_command(app)


def command_reference() -> str:
    """Markdown of every command: what it does, its arguments and its options."""
    lines = []
    for words, command in commands(application()):
        arguments = " ".join(
            one.metavar if one.metavar else one.name.upper()
            for one in command.params
            if one.param_type_name == "argument"
        )
        usage = " ".join(part for part in (words, arguments, "[OPTIONS]") if part)
        lines += [f"## {words}", "", f"`{usage}`", "", (command.help or "").strip(), ""]
        if command.epilog:
            lines += [command.epilog.strip(), ""]
        lines += ["| option | value | default | |", "|---|---|---|---|"]
        for one in command.params:
            if one.param_type_name == "argument":
                continue
            names = ", ".join(f"`{name}`" for name in [*one.opts, *one.secondary_opts])
            default = "required" if one.required else _default(one)
            text = (one.help or "").replace("|", "/")
            lines.append(f"| {names} | {_kind(one)} | {default} | {text} |")
        lines.append("")
    return "\n".join(lines)


def _kind(one: Any) -> str:
    if one.is_flag:
        return ""
    asked = one.type_descriptor.annotation
    name = str(asked) if get_args(asked) else asked.__name__
    inner = [part.__name__ for part in get_args(asked)]
    return (inner[0] if inner else name).lower() + (", repeatable" if one.multiple else "")


def _default(one: Any) -> str:
    value = one.default
    if value is None or value in ("", (), []) or (one.is_flag and value is False):
        return ""
    return "on" if value is True else f"`{value}`"


def on_config(config: Any) -> Any:
    """The reference of modules joins the navigation."""
    reference = [
        {package: [{name: f"api/{name}.md"} for name in modules(package)]} for package in PACKAGES
    ]
    config.nav.append({"Python reference": reference})
    return config


def on_files(files: Any, config: Any) -> Any:
    """A page for each module."""
    from mkdocs.structure.files import File

    for package in PACKAGES:
        for name in modules(package):
            text = f"---\ntitle: {name}\n---\n\n# `{name}`\n\n::: {name}\n"
            files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The mark of the command line's page becomes its reference."""
    if CLI_MARK not in markdown:
        return markdown
    return markdown.replace(CLI_MARK, command_reference())


def on_post_build(config: Any) -> None:
    """A page that fetches anything from another host ends the build."""
    from mkdocs.exceptions import PluginError

    pages = [path for path in Path(config.site_dir).rglob("*.html") if path.is_file()]
    for path in pages:  # the page of the module hooks.html is in a folder of that name
        outside = FETCHED.findall(path.read_text())
        if outside:
            raise PluginError(f"{path} fetches {outside[0]}; keep what pages need in docs/")
