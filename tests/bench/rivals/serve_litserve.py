"""LitServe: `defaults`, `tuned` with one worker of one thread per core, or `batched` with decode by threads."""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
import serve_engine
from fastapi import Body

WORKERS = {"defaults": 1, "tuned": serve_engine.CORES, "batched": 1}


class Api(litserve.LitAPI):
    """One image a call."""

    threads = serve_engine.CORES

    def setup(self, device: str) -> None:
        self.engine = serve_engine.load(streams=1, threads=self.threads)

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/png")]) -> np.ndarray:
        return self.engine.decode(request)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.engine.scores(x)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        return self.engine.answer(output)


class OneThread(Api):
    """The same for one of several workers."""

    threads = 1


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
    mode = sys.argv[2]
    apis = {"defaults": Api, "tuned": OneThread, "batched": BatchApi}
    api = apis[mode](max_batch_size=16) if mode == "batched" else apis[mode]()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS[mode], fast_queue=mode != "defaults")
    port = serve_engine.given()["port"]
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main()
