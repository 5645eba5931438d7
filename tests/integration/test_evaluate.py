"""evaluate, model calibrate and model promote on small published versions: figures, pages, new versions, the gate."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from factories import LABELS, SIDE_PX, load_pixels
from PIL import Image

from cnn_ray import calibration, promotion
from cnn_ray.artifact import load_artifact, read_aliases, set_alias, verify_artifact
from cnn_ray.calibration import divided, fit_calibration, fit_temperature, run_calibration, threshold_at
from cnn_ray.config import CalibrateConfig, DataConfig, EvaluateConfig, ModelDefinition, PromoteConfig
from cnn_ray.errors import ArtifactError, ConfigError, DataError, PromotionRefusedError
from cnn_ray.evaluate import run_evaluation, score_labelled

IMAGES = 160
HOSTILE = "<script>alert(1)</script>"


def write_labelled(root: Path, count: int = IMAGES) -> Path:
    """manifest.csv with file, label, site, origin: phishing is reddish, some of it not at all."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(3)
    lines = ["file,label,site,origin,side"]
    for k in range(count):
        phishing = k % 4 == 0
        pixels = rng.integers(0, 200, (24, 24, 3))
        pixels[:, :, 0] += int(abs(rng.normal(30 if phishing else 0, 14)))
        name = f"images/{k:03}{HOSTILE if k == 3 else ''}.png".replace("/alert", "alert").replace("</", "<")
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / name)
        origin = f"{HOSTILE}" if k % 3 == 0 else "crawl"
        lines.append(
            f"{name},{'phishing' if phishing else 'legitimate'},site{k // 2},{origin},{'test' if k % 2 else 'train'}"
        )
    (root / "broken.png").write_bytes(b"no image")
    lines.append("broken.png,legitimate,siteX,crawl,train")
    (root / "manifest.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    root = write_labelled(tmp_path_factory.mktemp("labelled"))
    return DataConfig(uri=str(root / "manifest.csv"), uri_column="file", group_column="site", source_column="origin")


@pytest.fixture(scope="module")
def models(tmp_path_factory, data) -> str:
    """red@1 was trained, and is made overconfident; red@2 is red@1 with a little noise; red@3 answers at random."""
    import keras

    from cnn_ray.dataset import read_labelled_set
    from cnn_ray.export import publish_artifact
    from cnn_ray.model import build_classifier

    folder = str(tmp_path_factory.mktemp("models"))
    definition = ModelDefinition(architecture="simple_cnn", input_size_px=SIDE_PX)
    labelled = read_labelled_set(data, split=False)
    loaded = load_pixels(labelled.root_uri, labelled.uris, (SIDE_PX, SIDE_PX))
    trained = build_classifier(definition, 2, seed=1)
    trained.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", jit_compile=False)
    trained.fit(loaded.pixels, labelled.label_ids[loaded.kept], epochs=15, batch_size=32, verbose=0)
    last = trained.get_layer("scores")
    last.set_weights([4 * w for w in last.get_weights()])
    noisy, random = build_classifier(definition, 2, seed=2), build_classifier(definition, 2, seed=3)
    rng = np.random.default_rng(4)
    noisy.set_weights([w + rng.normal(0, 1e-3, w.shape) for w in trained.get_weights()])
    for model in (trained, noisy, random):
        publish_artifact(
            model,
            models_uri=folder,
            name="red",
            definition=definition,
            labels=LABELS,
            positive_label="phishing",
            threshold=0.5,
            validation_pixels=loaded.pixels[:16],
            validation_labels=np.arange(16) % 2,
            training={},
        )
    return folder


def judged(kind, models: str, data: DataConfig, tmp_path: Path, model: str = "red@1", **more):
    settings = {"model": model, "models_uri": models, "data": data, "bootstrap_samples": 200, "precision": "f32"}
    if kind is EvaluateConfig:
        settings["output_uri"] = str(tmp_path / "evaluations")
    return kind(**settings | {"split": "all"} | more)


def test_evaluation_counts_everything_and_edits_nothing(models, data, tmp_path):
    before = load_artifact(models, "red@1").digest
    result = run_evaluation(judged(EvaluateConfig, models, data, tmp_path))
    found = result.figures
    assert found.images == IMAGES
    assert result.unreadable == {"not_an_image": 1}
    assert (found.binary.positives, found.binary.negatives) == (40, 120)
    assert found.binary.roc_auc.value > 0.7
    assert found.binary.roc_auc.low < found.binary.roc_auc.value < found.binary.roc_auc.high
    assert {part.name: part.images for part in result.sources} == {"crawl": 106, HOSTILE: 54}
    assert len(result.groups) == 20
    assert load_artifact(models, "red@1").digest == before
    saved = json.loads(Path(result.json_uri).read_text())
    assert saved["figures"]["binary"]["roc_auc"]["value"] == found.binary.roc_auc.value
    page = Path(result.page_uri).read_text()
    assert "Most confident mistakes" in page
    assert page.count("data:image/jpeg;base64,") == len(result.mistakes) > 0
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page


def test_labels_are_matched_by_name_and_unknown_ones_refused(models, data, tmp_path):
    artifact = load_artifact(models, "red@1")
    whole = score_labelled(judged(EvaluateConfig, models, data, tmp_path), artifact)
    turned = data.model_copy(update={"labels": ("phishing", "legitimate")})
    again = score_labelled(judged(EvaluateConfig, models, turned, tmp_path), artifact)
    np.testing.assert_array_equal(whole.truth, again.truth)
    manifest = Path(data.uri)
    other = manifest.with_name("other.csv")
    other.write_text(manifest.read_text().replace(",phishing,", ",malware,"))
    with pytest.raises(DataError, match="Received: 'malware'"):
        score_labelled(judged(EvaluateConfig, models, data.model_copy(update={"uri": str(other)}), tmp_path), artifact)


def test_scores_are_those_of_score(models, data, tmp_path):
    from cnn_ray.config import ScoreConfig
    from cnn_ray.outputs import read
    from cnn_ray.score import run_score

    artifact = load_artifact(models, "red@1")
    scored = score_labelled(judged(EvaluateConfig, models, data, tmp_path), artifact)
    result = run_score(
        ScoreConfig(
            model="red@1",
            models_uri=models,
            input_uri=data.uri,
            uri_column="file",
            output_uri=str(tmp_path / "out"),
            precision="f32",
            report=False,
        )
    )
    rows = {row["uri"]: row["scores"] for row in read(result.partition_uri).select(["uri", "scores"]).to_pylist()}
    assert len(rows) == IMAGES
    for uri, own in zip(scored.uris, scored.scores, strict=True):
        assert rows[uri] == own.tolist()


def test_a_test_set_remembers_who_was_judged_on_it(models, data, tmp_path):
    own = tmp_path / "models"
    shutil.copytree(models, own)
    split = data.model_copy(update={"split_column": "side", "group_column": None})
    first = run_evaluation(judged(EvaluateConfig, str(own), split, tmp_path, split="test"))
    second = run_evaluation(judged(EvaluateConfig, str(own), split, tmp_path, model="red@2", split="test"))
    assert (first.earlier, second.earlier) == ((), ("red@1",))
    assert "used before, 1 x (by red@1)" in Path(second.page_uri).read_text()
    assert first.figures.images == IMAGES / 2
    other = run_evaluation(judged(EvaluateConfig, str(own), split, tmp_path, split="validation"))
    assert other.earlier == ()


def test_one_class_alone_is_evaluated_without_areas(models, data, tmp_path):
    manifest = Path(data.uri)
    benign = manifest.with_name("benign.csv")
    lines = manifest.read_text().splitlines()
    benign.write_text("\n".join([lines[0], *(line for line in lines if ",legitimate," in line)]))
    result = run_evaluation(judged(EvaluateConfig, models, data.model_copy(update={"uri": str(benign)}), tmp_path))
    assert result.figures.binary.roc_auc.value is None
    assert "cannot be computed" in Path(result.page_uri).read_text()


def test_calibration_writes_a_new_version_whose_scores_are_better_probabilities(models, data, tmp_path):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    before = {p: p.read_bytes() for p in Path(own, "red", "1").rglob("*") if p.is_file()}
    fitted, artifact = run_calibration(judged(CalibrateConfig, own, data, tmp_path, max_fpr=0.05))
    assert artifact.reference == "red@4"
    assert before == {p: p.read_bytes() for p in Path(own, "red", "1").rglob("*") if p.is_file()}
    assert verify_artifact(artifact) > 3
    assert artifact.threshold == fitted.threshold.value
    assert artifact.description.calibration["from_reference"] == "red@1"
    assert fitted.temperature > 1.2, "red@1 is overconfident"
    assert fitted.log_loss_after < fitted.log_loss_before - 0.01
    assert fitted.supported
    assert fitted.fpr.value <= 0.05
    assert fitted.threshold.low <= fitted.threshold.value <= fitted.threshold.high
    after = run_evaluation(judged(EvaluateConfig, own, data, tmp_path, model="red@4"))
    old = run_evaluation(judged(EvaluateConfig, own, data, tmp_path))
    assert after.figures.calibration_error.value < old.figures.calibration_error.value
    assert after.figures.accuracy.value == old.figures.accuracy.value, "labels do not change"
    assert after.figures.binary.fpr_at_threshold.value == fitted.fpr.value
    assert after.figures.binary.recall_at_threshold.value == fitted.recall.value


def test_too_few_negatives_are_said_plainly(models, data, tmp_path):
    fitted = fit_calibration(judged(CalibrateConfig, models, data, tmp_path, max_fpr=0.001))
    assert not fitted.supported
    assert "120 negatives are too few for a false-positive rate of 0.10%, which needs 1,000" in fitted.sentence
    assert fitted.fpr.value == 0


def test_calibration_needs_positives_negatives_and_a_positive_label(models, data, tmp_path, monkeypatch):
    manifest = Path(data.uri)
    benign = manifest.with_name("benign2.csv")
    lines = manifest.read_text().splitlines()
    benign.write_text("\n".join([lines[0], *(line for line in lines if ",legitimate," in line)]))
    with pytest.raises(DataError, match="Received: 0 and 120"):
        fit_calibration(judged(CalibrateConfig, models, data.model_copy(update={"uri": str(benign)}), tmp_path))
    artifact = load_artifact(models, "red@1")
    plain = artifact.description.model_copy(update={"positive_label": None})
    monkeypatch.setattr(calibration, "load_artifact", lambda *_: type(artifact)(artifact.uri, artifact.digest, plain))
    with pytest.raises(ConfigError, match="positive label"):
        fit_calibration(judged(CalibrateConfig, models, data, tmp_path))


def test_neighbouring_scores_do_not_break_the_budget():
    """Between two float32 that are neighbours lies no third: half-way would round to the negative itself."""
    low = np.float32(1 - 2 * 2**-24)
    high = np.nextafter(low, np.float32(2))
    score = np.array([0.1] * 98 + [low, high], np.float32)
    positive = np.arange(100) == 99
    threshold = threshold_at(score, positive, 0.001)
    assert (score >= threshold).tolist() == positive.tolist()


def test_a_set_without_mistakes_does_not_sharpen_the_scores():
    scores = np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert fit_temperature(scores, np.array([0, 1, 0])) == 1.0


def trained_on(models: str, data: DataConfig) -> None:
    """Writes into red@1 that it was trained on the data."""
    from cnn_ray.dataset import absolute_uri, read_labelled_set

    described = Path(models, "red", "1", "artifact.json")
    told = json.loads(described.read_text())
    own = json.loads(data.model_dump_json()) | {"uri": absolute_uri(data.uri)}
    told["training"] = {
        "config": {"data": own},
        "data_digest": read_labelled_set(data).digest(),
        "split_uri": "runs/red/_split.parquet",
    }
    described.write_text(json.dumps(told))


def test_on_its_own_data_a_model_is_judged_by_the_split_of_its_training(models, data, tmp_path):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    learnt = data.model_copy(update={"validation_fraction": 0.3, "test_fraction": 0.2, "split_seed": 5})
    trained_on(own, learnt)
    bare = DataConfig(uri=data.uri, uri_column="file")
    artifact = load_artifact(own, "red@1")
    validation = score_labelled(judged(EvaluateConfig, own, bare, tmp_path, split="auto"), artifact)
    test = score_labelled(judged(EvaluateConfig, own, bare, tmp_path, split="test"), artifact)
    assert validation.split == "validation"
    assert 0.2 < len(validation.truth) / IMAGES < 0.3
    assert 0.15 < len(test.truth) / IMAGES < 0.25
    assert not set(validation.groups) & set(test.groups)
    other = DataConfig(uri=data.uri, uri_column="file", split_seed=6)
    with pytest.raises(DataError, match=r"Expected the split.*_split\.parquet.*--data-split-column split"):
        score_labelled(judged(EvaluateConfig, own, other, tmp_path, split="validation"), artifact)


def test_data_of_one_side_alone_are_judged(models, data, tmp_path):
    manifest = Path(data.uri)
    alone = manifest.with_name("alone.csv")
    lines = manifest.read_text().splitlines()
    alone.write_text("\n".join([lines[0], *(line for line in lines if line.endswith(",test"))]))
    config = DataConfig(uri=str(alone), uri_column="file", split_column="side")
    artifact = load_artifact(models, "red@1")
    scored = score_labelled(judged(EvaluateConfig, models, config, tmp_path, split="test"), artifact)
    assert len(scored.truth) == IMAGES / 2
    whole = score_labelled(judged(EvaluateConfig, models, data, tmp_path, split="auto"), artifact)
    assert (whole.split, len(whole.truth)) == ("all", IMAGES)


def test_a_candidate_without_the_champions_calibration_is_noted(models, data, tmp_path):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    _, calibrated = run_calibration(judged(CalibrateConfig, own, data, tmp_path, max_fpr=0.05))
    set_alias(own, "red", "champion", calibrated.version)
    verdict = promotion.judge(judged(PromoteConfig, own, data, tmp_path))
    assert "red@4 has a calibrated threshold" in verdict.note
    assert verdict.threshold == 0.5


def test_temperature_is_found_again():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 1.5
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.array([rng.choice(3, p=p) for p in likely])
    sharp = divided(likely, 1 / 2.5)
    assert fit_temperature(sharp, truth) == pytest.approx(2.5, rel=0.08)
    np.testing.assert_allclose(divided(sharp, 2.5), likely, atol=1e-6)


@pytest.mark.parametrize(("max_fpr", "flagged"), [(0.0, 0), (0.24, 0), (0.25, 1), (0.5, 3), (0.75, 3), (1.0, 4)])
def test_the_threshold_keeps_the_budget_with_ties(max_fpr, flagged):
    """Four negatives at 0.2, 0.5, 0.5, 0.9: two share a score, so that one budget cannot be used up."""
    score = np.array([0.2, 0.5, 0.5, 0.9, 0.95, 0.4])
    positive = np.array([0, 0, 0, 0, 1, 1], bool)
    threshold = threshold_at(score, positive, max_fpr)
    expected = {0: 0, 1: 1, 3: 1 if max_fpr == 0.5 else 3, 4: 4}[flagged]
    assert int(((score >= threshold) & ~positive).sum()) == expected


def test_a_worse_version_is_refused_unless_forced_with_a_reason(models, data, tmp_path):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    first = judged(PromoteConfig, own, data, tmp_path)
    promotion.promote(first, promotion.judge(first))
    assert read_aliases(own, "red") == {"champion": 1}
    worse = judged(PromoteConfig, own, data, tmp_path, model="red@3")
    verdict = promotion.judge(worse)
    assert verdict.worse
    assert verdict.difference.high < 0
    with pytest.raises(PromotionRefusedError, match="worse beyond noise") as refused:
        promotion.promote(worse, verdict)
    assert refused.value.exit_code == 3
    assert read_aliases(own, "red") == {"champion": 1}
    forced = judged(PromoteConfig, own, data, tmp_path, model="red@3", force=True, reason="a drill")
    promotion.promote(forced, verdict)
    assert read_aliases(own, "red") == {"champion": 3}
    records = [json.loads(p.read_text()) for p in sorted(Path(own, "red", "_promotions").glob("*.json"))]
    assert [(r["reference"], r["champion"], r["forced"], r["reason"]) for r in records] == [
        ("red@1", None, False, None),
        ("red@3", "red@1", True, "a drill"),
    ]


def test_a_version_that_differs_by_noise_is_promoted(models, data, tmp_path):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    set_alias(own, "red", "champion", 1)
    config = judged(PromoteConfig, own, data, tmp_path, model="red@2")
    verdict = promotion.judge(config)
    assert not verdict.worse
    promotion.promote(config, verdict)
    assert read_aliases(own, "red") == {"champion": 2}


def test_a_champion_that_changed_meanwhile_stays(models, data, tmp_path):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    set_alias(own, "red", "champion", 3)
    config = judged(PromoteConfig, own, data, tmp_path, model="red@1")
    verdict = promotion.judge(config)
    set_alias(own, "red", "champion", 2)
    with pytest.raises(PromotionRefusedError, match="another promotion came first"):
        promotion.promote(config, verdict)
    assert read_aliases(own, "red") == {"champion": 2}


def test_both_versions_are_judged_on_the_candidates_images(models, data, tmp_path):
    """The candidate was trained on these data, the champion was not: by itself it would be judged on all of them."""
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    trained_on(own, data.model_copy(update={"validation_fraction": 0.3}))
    set_alias(own, "red", "champion", 2)
    verdict = promotion.judge(judged(PromoteConfig, own, data, tmp_path, split="auto"))
    assert verdict.split == "validation"
    assert verdict.images < IMAGES / 2
    assert verdict.difference.value == verdict.candidate_value - verdict.champion_value


def test_versions_with_other_labels_are_not_compared(models, data, tmp_path, monkeypatch):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    set_alias(own, "red", "champion", 2)
    described = Path(own, "red", "2", "artifact.json")
    described.write_text(described.read_text().replace('"legitimate"', '"benign"'))
    with pytest.raises(ArtifactError, match="to have the labels of red@2"):
        promotion.judge(judged(PromoteConfig, own, data, tmp_path))


def test_force_needs_a_reason(models, data, tmp_path):
    with pytest.raises(ValueError, match="Expected --reason"):
        judged(PromoteConfig, models, data, tmp_path, force=True, reason="  ")


def test_versions_with_another_positive_label_are_compared_by_accuracy_alone(models, data, tmp_path):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    set_alias(own, "red", "champion", 2)
    described = Path(own, "red", "2", "artifact.json")
    found = json.loads(described.read_text())
    described.write_text(json.dumps(found | {"positive_label": "legitimate"}))
    with pytest.raises(ArtifactError, match="positive label of red@2: legitimate"):
        promotion.judge(judged(PromoteConfig, own, data, tmp_path))
    assert promotion.judge(judged(PromoteConfig, own, data, tmp_path, metric="accuracy")).champion == "red@2"


def test_images_of_one_group_cannot_excuse_a_worse_version_as_noise(models, data, tmp_path):
    own = str(tmp_path / "models")
    shutil.copytree(models, own)
    set_alias(own, "red", "champion", 1)
    manifest = Path(data.uri)
    single = manifest.with_name("single.csv")
    single.write_text(re.sub(r",site\w+,", ",site0,", manifest.read_text()))
    one = data.model_copy(update={"uri": str(single)})
    verdict = promotion.judge(judged(PromoteConfig, own, one, tmp_path, model="red@3"))
    assert verdict.difference.high is None
    assert verdict.worse
    assert "to tell it from noise" in verdict.sentence
