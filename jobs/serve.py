"""Ray Serve's way in: `serve run jobs.serve:build_app model=demo@1`, or `serve deploy jobs/serve.yaml` on a cluster."""

from ray.serve import Application

from cnn_ray import serve
from cnn_ray.config import ServeConfig


def build_app(args: ServeConfig) -> Application:
    """The application of the configured model; Ray builds the configuration from `key=value` or the YAML's `args`.

    Raises:
        ArtifactError: no such model.
    """
    return serve.build_app(args)
