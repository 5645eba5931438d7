"""The verbs about the endpoint: `keys add | list | remove`."""

from __future__ import annotations

import click


@click.group()
def keys() -> None:
    """Make, list and remove the API keys of an endpoint; running endpoints follow within seconds."""


_keys_uri = click.option(
    "--keys", "keys_uri", required=True, metavar="FILE", help="The key file: a path or an s3:// object."
)


@keys.command("add")
@click.argument("name")
@_keys_uri
def keys_add(name: str, keys_uri: str) -> None:
    """Make a key for NAME and print it, this once: the file keeps its hash only."""
    from cnn_ray.auth import add_key

    click.echo(add_key(keys_uri, name))
    click.echo(f"The key of {name}, shown this once. Clients send it as: Authorization: Bearer KEY", err=True)


@keys.command("list")
@_keys_uri
def keys_list(keys_uri: str) -> None:
    """List the names of the keys, and when each was made."""
    from cnn_ray.auth import list_keys
    from cnn_ray.console import print_table
    from cnn_ray.flags import stdout_console

    found = list_keys(keys_uri)
    if not found:
        click.echo(f"No keys in {keys_uri}. Next: cnn-ray keys add NAME --keys {keys_uri}.")
        return
    print_table(stdout_console(), "", [(key.name, key.created_at) for key in found], ("name", "created"))


@keys.command("remove")
@click.argument("name")
@_keys_uri
def keys_remove(name: str, keys_uri: str) -> None:
    """Take the key of NAME away."""
    from cnn_ray.auth import remove_key

    remove_key(keys_uri, name)
    click.echo(f"Removed the key of {name} from {keys_uri}")
