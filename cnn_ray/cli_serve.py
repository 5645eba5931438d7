"""The verbs about the endpoint: `serve`, and `keys add | list | remove`."""

from __future__ import annotations

from typing import Any

import click

from cnn_ray.config import ServeConfig
from cnn_ray.flags import config_flags, config_from_flags, shared_flags, stderr_console
from cnn_ray.flags import print_config as show_config


@click.command()
@config_flags(ServeConfig)
@shared_flags
def serve(config_file: str | None, print_config: bool, dry_run: bool, **flags: Any) -> None:
    """Answer single screenshots over HTTP, as TensorFlow Serving and Triton do, with a page for people at /."""
    config = config_from_flags(ServeConfig, config_file, flags)
    if print_config:
        return show_config(config)
    from cnn_ray.artifact import load_artifact
    from cnn_ray.auth import require_keys

    name = config.model.partition("@")[0]
    if dry_run:
        require_keys(config.host, config)
        served = ", ".join(load_artifact(config.models_uri, model).reference for model in (config.model, *config.also))
        return click.echo(f"Would serve {served} at {config.host}:{config.port}")
    from cnn_ray import console as ui
    from cnn_ray.serve import run_server

    def ready(url: str) -> None:
        click.echo(f"Ready: {url}/v1/models/{name}:predict" + (f", page at {url}/" if config.page else ""))

    ui.say(stderr_console(), f"Starting Ray Serve for {config.model} (about 15 s; Ctrl-C ends it)")
    return run_server(config, on_ready=ready)


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
