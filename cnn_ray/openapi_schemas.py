# pyright: strict
"""The JSON of both protocols as JSON Schema 2020-12, for the OpenAPI document.

Two formats are our own: `base64-image` and `image-file` are an image in base64 and as it is. What a schema cannot say:
which bytes are an image, that pixels have the model's size, that data have as many elements as their shape says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Json: TypeAlias = dict[str, object]

_TEXT: Json = {"type": "string"}
_SCORE: Json = {"type": "number", "minimum": 0, "maximum": 1}


def build_schemas(max_instances: int) -> Json:
    """All schemas by name; a request has at most so many instances."""
    return {
        "Error": _object(["error"], error=_TEXT),
        **_rest_requests(max_instances),
        **_rest_answers(),
        **_infer_requests(max_instances),
        **_infer_answers(),
        **_triton_schemas(),
    }


def _object(required: Sequence[str] = (), *, closed: bool = False, **properties: object) -> Json:
    schema: Json = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    if closed:
        schema["additionalProperties"] = False
    return schema


def _closed(**properties: object) -> Json:
    return _object(list(properties), closed=True, **properties)


def _list(items: object, least: int = 0, most: int | None = None) -> Json:
    schema: Json = {"type": "array", "items": items}
    if least:
        schema["minItems"] = least
    if most is not None:
        schema["maxItems"] = most
    return schema


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _one_of(*schemas: object) -> Json:
    return {"oneOf": list(schemas)}


def _predict(most: int, *inputs: tuple[str, str]) -> Json:
    """Rows or columns of one of the inputs (name, schema of a value), named or not."""
    lists = [_list(_ref(schema), 1, most) for _, schema in inputs]
    rows = _one_of(*lists, *(_list(_closed(**{name: _ref(schema)}), 1, most) for name, schema in inputs))
    by_name = [_object([name], closed=False, **{name: values}) for (name, _), values in zip(inputs, lists, strict=True)]
    columns: Json = {"anyOf": [*lists, *by_name]}
    signature: Json = {"enum": ["", "serving_default", "serving_pixels"][: len(inputs) + 1]}
    return _one_of(
        {**_object(["instances"], instances=rows, signature_name=signature), "not": {"required": ["inputs"]}},
        {**_object(["inputs"], inputs=columns, signature_name=signature), "not": {"required": ["instances"]}},
    )


def _rest_requests(most: int) -> Json:
    channel: Json = {"type": "integer", "minimum": 0, "maximum": 255}
    images = ("image_bytes", "EncodedImage")
    feature = _one_of(_ref("EncodedImage"), _list(_ref("EncodedImage"), 1, 1))
    return {
        "EncodedImage": _closed(b64={**_TEXT, "format": "base64-image"}),
        "Pixels": {**_list(_list(_list(channel, 3, 3), 1), 1), "description": "Rows of RGB, of the model's size."},
        "Predict": _predict(most, images, ("pixels", "Pixels")),
        "Explain": {**_predict(1, images), "description": "One encoded image."},
        "Classify": _object(
            ["examples"],
            signature_name={"enum": ["", "serving_default"]},
            context={"type": "object"},
            examples=_list(_object(["image_bytes"], image_bytes=feature), 1, most),
        ),
    }


def _rest_answers() -> Json:
    named = _closed(classes=_list(_TEXT, 1), scores=_list(_SCORE, 1))
    columns = _closed(classes=_list(_list(_TEXT, 1), 1), scores=_list(_list(_SCORE, 1), 1))
    pair = {**_list({"type": ["string", "number"]}, 2, 2), "description": "Label and score."}
    state: Json = {"enum": ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]}
    health = _closed(error_code=_TEXT, error_message=_TEXT)
    return {
        "Predictions": _one_of(
            _closed(predictions=_list(_one_of(named, _list(_SCORE, 1)), 1)),
            _closed(outputs=_one_of(columns, _list(_list(_SCORE, 1), 1))),
        ),
        "Verdict": _closed(
            label=_TEXT,
            score=_SCORE,
            flagged={"type": ["boolean", "null"]},
            scores={"type": "object", "additionalProperties": _SCORE},
            model=_TEXT,
            version={"type": "integer", "minimum": 1},
        ),
        "Classifications": _closed(results=_list(_list(pair, 1), 1)),
        "Status": _closed(
            model_version_status=_list(_closed(version={**_TEXT, "pattern": "^[0-9]+$"}, state=state, status=health), 1)
        ),
        "Metadata": _closed(
            model_spec=_closed(name=_TEXT, signature_name=_TEXT, version=_TEXT),
            metadata=_closed(
                signature_def=_closed(signature_def={"type": "object", "additionalProperties": _ref("Signature")})
            ),
        ),
        **_signatures(),
    }


def _signatures() -> Json:
    tensors: Json = {"type": "object", "additionalProperties": _ref("TensorInfo")}
    shape = _closed(dim=_list(_closed(size=_TEXT, name=_TEXT)), unknown_rank={"type": "boolean"})
    return {
        "Signature": _closed(inputs=tensors, outputs=tensors, method_name=_TEXT, defaults={"type": "object"}),
        "TensorInfo": _closed(dtype=_TEXT, tensor_shape=shape, name=_TEXT),
    }


def _infer_requests(most: int) -> Json:
    size: Json = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
    count: Json = {"type": "integer", "minimum": 1, "maximum": most}
    rows = _list({**_TEXT, "format": "base64-image"}, 1, most)
    image = _object(
        ["name", "datatype", "shape", "data"],
        name={"const": "image"},
        datatype={"const": "BYTES"},
        shape={"type": "array", "prefixItems": [count, {"const": 1}], "items": False, "minItems": 1},
        data=rows,
        parameters={"type": "object", "maxProperties": 0},
    )
    pixels = _object(
        ["name", "datatype", "shape", "data"],
        name={"const": "pixels"},
        datatype={"const": "UINT8"},
        shape={"type": "array", "prefixItems": [count, size, size, {"const": 3}], "items": False, "minItems": 4},
        data={"type": "array", "description": "Flat, or nested as the shape says.", "minItems": 3},
        parameters={"type": "object", "maxProperties": 0},
    )
    flag: Json = {"type": "boolean"}
    classes: Json = {"type": "integer", "minimum": 0, "description": "So many of the best classes, as text."}
    label = _object(["name"], name={"const": "label"}, parameters=_object(binary_data=flag, closed=True))
    of_scores = _object(binary_data=flag, classification=classes, closed=True)
    scores = _object(["name"], name={"const": "scores"}, parameters=of_scores)
    return {
        "Infer": _object(
            ["inputs"],
            id=_TEXT,
            inputs=_list(_one_of(image, pixels), 1, 1),
            outputs={**_list(_one_of(label, scores), 0, 2), "description": "Each name once."},
            parameters=_object(binary_data_output=flag, closed=True),
        )
    }


def _infer_answers() -> Json:
    tensor = _object(
        ["name", "datatype", "shape"],
        closed=True,
        name={"enum": ["label", "scores"]},
        datatype={"enum": ["BYTES", "FP32"]},
        shape=_list({"type": "integer"}, 1, 2),
        data=_list({"type": ["string", "number"]}, 1),
        parameters=_closed(binary_data_size={"type": "integer"}),
    )
    described = _list(_closed(name=_TEXT, datatype=_TEXT, shape=_list({"type": "integer"}, 1)), 1)
    return {
        "Inferred": _object(
            ["model_name", "model_version", "outputs"],
            closed=True,
            id=_TEXT,
            model_name=_TEXT,
            model_version=_TEXT,
            outputs=_list(tensor, 1, 2),
        ),
        "Live": _closed(live={"const": True}),
        "Ready": _closed(ready={"const": True}),
        "ModelReady": _closed(name=_TEXT, ready={"type": "boolean"}),
        "ServerMetadata": _closed(name=_TEXT, version=_TEXT, extensions=_list(_TEXT)),
        "ModelMetadata": _closed(
            name=_TEXT,
            versions=_list({**_TEXT, "pattern": "^[0-9]+$"}, 1),
            platform=_TEXT,
            inputs=described,
            outputs=described,
            parameters={"type": "object", "additionalProperties": _TEXT},
        ),
    }


def _triton_schemas() -> Json:
    number: Json = {"type": "integer", "minimum": 0}
    duration = _closed(count=number, ns=number)
    kinds = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
    statistics = _closed(
        name=_TEXT,
        version=_TEXT,
        last_inference=number,
        inference_count=number,
        execution_count=number,
        inference_stats=_closed(**dict.fromkeys(kinds, duration)),
        batch_stats=_list(_object()),
    )
    state: Json = {"enum": ["READY", "UNAVAILABLE"]}
    dims = _list({"type": "integer", "minimum": 1})
    output = _object(["name", "data_type", "dims"], name=_TEXT, data_type=_TEXT, dims=dims)
    return {
        "Index": _object(ready={"type": ["boolean", "null"]}),
        "RepositoryIndex": _list(_closed(name=_TEXT, version=_TEXT, state=state, reason=_TEXT)),
        "ModelStatistics": _closed(model_stats=_list(statistics)),
        "ModelConfig": _closed(
            name=_TEXT,
            platform=_TEXT,
            backend=_TEXT,
            max_batch_size={"type": "integer", "minimum": 1},
            input=_list({**output, "description": "A request has one of them."}, 1),
            output=_list(output, 1),
        ),
    }
