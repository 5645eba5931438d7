"""LitServe: `defaults`, or `tuned` with batching, decode in threads of the worker and the fast queue."""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
import serve_engine
from fastapi import Body


class Api(litserve.LitAPI):
    """One image a call."""

    def setup(self, device: str) -> None:
        self.engine = serve_engine.load(streams=1)

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/png")]) -> np.ndarray:
        return self.engine.decode(request)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.engine.scores(x)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        return self.engine.answer(output)


class BatchApi(Api):
    """Decode moves into predict, where the batch's images are decoded by several threads."""

    def setup(self, device: str) -> None:
        self.engine = serve_engine.load()

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/png")]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, x: list[bytes]) -> list[np.ndarray]:
        return self.engine.batch(self.engine.decode_batch(x))

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output


def main() -> None:
    tuned = sys.argv[2] == "tuned"
    api = BatchApi(max_batch_size=16, batch_timeout=0.0) if tuned else Api()
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=tuned)
    port = serve_engine.given()["port"]
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main()
