"""`charter completion`: what a shell needs to complete verbs and options."""

from __future__ import annotations

import click

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print a script that lets a shell complete verbs and options.

    \b
    Examples:
      charter completion bash >> ~/.bashrc
      charter completion zsh >> ~/.zshrc
      charter completion fish > ~/.config/fish/completions/charter.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, shell
    click.echo(found(click.get_current_context().find_root().command, {}, "charter", "_CHARTER_COMPLETE").source())


VERBS = (completion,)
