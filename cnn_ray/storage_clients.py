# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""The two S3 clients of a store: boto3's, which reads every setting that AWS knows, and obstore's, which is quick."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from cnn_ray.config import StorageConfig
from cnn_ray.errors import ConfigError
from cnn_ray.storage_retry import error_of_s3

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
CONNECTIONS = 64
CREDENTIALS_TTL = timedelta(minutes=5)
_ADDRESS = re.compile(r"://(\[|[0-9.]+(:|/|$))")
"""A server named by its IP address has no host for each bucket; boto3 then uses paths, whatever is configured."""


def make_clients(bucket: str, options: StorageConfig) -> tuple[Any, Any]:
    """Return boto3's client, and obstore's or None where only boto3 can speak to this server.

    Raises:
        CredentialsError, ConfigError: the AWS settings make no client.
    """
    client, credentials, style = _boto3_client(options)
    if not credentials or (style == "virtual" and "." in bucket):
        return client, None
    virtual = style == "virtual" and not _ADDRESS.search(str(client.meta.endpoint_url))
    return client, _obstore(bucket, client, credentials, options, virtual=virtual)


def _boto3_client(options: StorageConfig) -> tuple[Any, Any, str | None]:
    """A client without retries of its own, the session's credentials or None, and the configured addressing style.

    Servers other than AWS rarely have a DNS name for each bucket, so they get paths unless the configuration or the
    profile says otherwise.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config: Any = Config(
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    if options.addressing_style is not None:
        config = config.merge(Config(s3={"addressing_style": options.addressing_style}))
    try:
        session: Any = boto3.Session()
        client: Any = session.client("s3", config=config)
        settings: Any = client.meta.config.s3
        configured: str | None = settings.get("addressing_style") if settings else None
        if configured is None and "amazonaws.com" not in client.meta.endpoint_url:
            client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
        # With the wildcard it comes before botocore's own `before-parse.s3.*`, which would parse the whole page.
        client.meta.events.register_first("before-parse.*.ListObjectsV2", _keep_page)
        return client, session.get_credentials(), configured
    except BotoCoreError as error:
        raise error_of_s3(error, "S3") from error
    except ValueError as error:  # an endpoint that is no URL
        raise ConfigError(
            "Expected AWS settings that make an S3 client. Received: an invalid endpoint or region. "
            "Next: check AWS_ENDPOINT_URL and ~/.aws/config."
        ) from error


def _obstore(bucket: str, client: Any, credentials: Any, options: StorageConfig, *, virtual: bool) -> Any:
    """obstore's client for the same server, region and credentials; it never retries, `attempts` does."""
    from obstore.store import S3Store as Quick

    def frozen() -> dict[str, Any]:
        now = credentials.get_frozen_credentials()
        expires_at = datetime.now(UTC) + CREDENTIALS_TTL
        keys = {"access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token}
        return keys | {"expires_at": expires_at}

    region, endpoint = client.meta.region_name, str(client.meta.endpoint_url)
    if virtual:  # obstore wants the bucket's own host then
        endpoint = endpoint.replace("://", f"://{bucket}.", 1)
    make: Any = Quick
    return make(
        bucket,
        endpoint=endpoint,
        region="us-east-1" if region in (None, "aws-global") else region,
        virtual_hosted_style_request=virtual,
        request_payer=options.request_payer is not None,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
            "timeout": timedelta(seconds=10 * READ_TIMEOUT_S),
        },
        retry_config={"max_retries": 0},
        credential_provider=frozen,
    )


def _keep_page(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Takes a listing page out of botocore's hands, whose parser takes 50 ms for it, and leaves it an empty one.

    The answer holds the XML as `Page`. An error in a 200 answer stays: botocore knows those.
    """
    body = response_dict["body"]
    if response_dict["status_code"] == 200 and b"<Error" not in body[:500]:
        customized_response_dict["Page"] = body
        response_dict["body"] = b"<ListBucketResult/>"
