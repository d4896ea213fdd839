"""Films to a vision model over real HTTP, by a labeller that looks at the pixels it was sent."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from autointerp.client import Client, EndpointConfig, Ledger, Limits
from autointerp.explaining import explain
from autointerp.features import Example, Stats
from autointerp.label_config import LabelConfig, Sources
from autointerp.labellers import Llm
from autointerp.vision import VisionConfig, vision_request
from hooks.files import ConfigError, EndpointError
from hooks.studies import Study
from maira_sae.scripted_labeller import reply as words_reply
from maira_sae.scripted_server import Script, serving

N, SIZE, GRID = 20, 32, 4


@pytest.fixture
def studies(tmp_path):
    made = {}
    for i in range(N):
        path = tmp_path / f"{i}.png"
        pixels = np.zeros((SIZE, SIZE), dtype=np.uint8)
        pixels[:, : i + 1] = 255  # a film is told by how much of it is white
        Image.fromarray(pixels).save(path)
        report = "left nodule seen ." if i % 2 else "heart size is normal ."
        made[f"s{i}"] = Study(id=f"s{i}", frontal=path, report=report)
    return made


def by_films(client, features, latents, studies, size, config=None):
    asked = {n: vision_request(features, n, studies, size, config=config) for n in latents}
    return explain(client, asked)


class Known:
    """A latent on at the upper right patch of odd films."""

    def __init__(self, dense=False):
        self.is_dense = dense
        self.all = []
        for i in range(N):
            values = np.zeros(GRID * GRID)
            values[GRID - 1] = (1.0 + i / 100) * (i % 2)
            kind = "top" if i % 2 else "random_silent"
            side = "explain" if i < 16 else "score"
            self.all.append(
                Example(
                    *(0, "frontal", kind, side, f"s{i}", f"p{i}", i, "frontal", None, []),
                    *(values.tolist(), float(values.max()), 0, (0, 15), (GRID, GRID)),
                )
            )

    def dense(self, latent):
        return self.is_dense

    def stats(self, latent):
        fired = {"frontal": 8 if latent == 0 else 0, "report": 50}
        return {name: Stats(100, n, 0.1, 0, 0, 2, 1, 1, 1, 20, 8) for name, n in fired.items()}

    def examples(self, latent, modality=None, kind=None, set=None):
        return [e for e in self.all if set in (None, e.set) and kind in (None, e.kind)]


def pictures(body):
    """Films that a request shows, in two groups."""
    groups = [[], []]
    group = 0
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            group = int(part["text"].startswith("Off:"))
        else:
            kind, _, data = part["image_url"]["url"].partition(";base64,")
            assert kind == "data:image/jpeg"
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            groups[group].append(np.asarray(image).astype(int))
    return groups


def coloured(image):
    """Where a picture's lower half is not grey."""
    lower = image[image.shape[0] // 2 :]
    return lower.max(2) - lower.min(2) > 40


def look(body):
    on, off = pictures(body)
    place = np.mean([coloured(one) for one in on], axis=0) if on else np.zeros((2, 2))
    high, wide = (n // 2 for n in place.shape)
    where = place[:high, wide:].sum() / max(place.sum(), 1e-9)
    clear = where > 0.95 and not any(coloured(one).any() for one in off)
    label = "upper right" if clear else None
    return json.dumps({"label": label, "confidence": 1.0 if clear else 0.0, "evidence": ""})


def client_of(server, folder, **limits):
    config = EndpointConfig(server.url, "scripted", limits=Limits(**limits))
    return Client(config, Ledger(folder / "ledger.sqlite"))


def test_films_arrive_plain_and_coloured_and_the_place_is_read_off(tmp_path, studies):
    config = VisionConfig(n_on=5, n_off=3, height=64)
    with serving(Script(), look) as server:
        client = client_of(server, tmp_path)
        told = by_films(client, Known(), [0, 1], studies, SIZE, config)
        again = by_films(client, Known(), [0, 1], studies, SIZE, config)
        assert server.asked.total() == 1 and again == told
        on, off = pictures(server.bodies[0])
    assert told.found[0].label == "upper right" and told.unasked == (1,) and told.missing == ()
    assert (len(on), len(off)) == (5, 3)
    for image in on + off:
        assert image.shape == (128, 64, 3)
        assert (np.ptp(image[:60], axis=2) <= 6).all()  # the plain film has no colour
    assert all(coloured(one).any() for one in on) and not any(coloured(one).any() for one in off)
    # Strongest first, of explaining patients only.
    shown = [round(float(image[:60].mean()) / 255 * SIZE) - 1 for image in on]
    assert shown == [15, 13, 11, 9, 7]


def test_no_clear_concept_and_an_unreadable_reply_are_told_apart(tmp_path, studies):
    none = json.dumps({"label": None, "confidence": 0.0, "evidence": ""})
    for name, answer in (("none", none), ("lost", "I see a film.")):
        with serving(Script(), lambda body, answer=answer: answer) as server:
            client = client_of(server, tmp_path / name)
            told = by_films(client, Known(), [0], studies, SIZE)
        assert (told.found[0].label is None) if name == "none" else told.missing == (0,)


def test_an_endpoint_without_schemas_is_told_in_words_beside_the_films(tmp_path, studies):
    with serving(Script(schemas=False), look) as server:
        told = by_films(client_of(server, tmp_path), Known(), [0], studies, SIZE)
        last = server.bodies[-1]["messages"][0]["content"][-1]
    assert told.found[0].label == "upper right"
    assert last["type"] == "text" and "JSON object of this schema" in last["text"]


def test_a_dense_latent_and_films_without_records_are_not_asked_about(studies):
    assert vision_request(Known(dense=True), 0, studies, SIZE) is None
    assert vision_request(Known(), 0, {}, SIZE) is None
    assert vision_request(Known(), 0, studies, SIZE, "report") is None
    with pytest.raises(ConfigError, match="at least one"):
        VisionConfig(n_on=0)


def test_films_go_to_another_machine_only_by_leave_of_their_own(tmp_path, studies):
    request = vision_request(Known(), 0, studies, SIZE)
    far = "http://llm.example.org/v1"
    text_only = EndpointConfig(far, "m", allow_remote="llm.example.org")
    client = Client(text_only, Ledger(tmp_path / "ledger.sqlite"))
    with pytest.raises(EndpointError, match=r"pixels.*--allow-remote-images llm\.example\.org"):
        client.ask_all([request])
    assert not (tmp_path / "requests.jsonl").exists()
    both = EndpointConfig(
        far, "m", allow_remote="llm.example.org", allow_remote_images="llm.example.org"
    )
    allowed = Client(both, Ledger(tmp_path / "ledger.sqlite"))
    content = [{"type": "text", "text": "Seen by Dr. Roe"}, *request.messages[0]["content"][1:]]
    body = allowed.body([{"role": "user", "content": content}], 10)
    sent = body["messages"][0]["content"]
    assert sent[0]["text"] == "Seen by [NAME]"
    assert sent[1:] == content[1:]


def test_images_count_in_the_estimate(tmp_path, studies):
    request = vision_request(Known(), 0, studies, SIZE, config=VisionConfig(n_on=2, n_off=1))
    with serving(Script(), look) as server:
        few = client_of(server, tmp_path, tokens_per_image=0).estimate([request]).tokens_in
        many = client_of(server, tmp_path, tokens_per_image=700).estimate([request]).tokens_in
    assert many - few == 3 * 700 and few < 500


def test_image_latents_are_explained_by_reports(tmp_path, studies):
    config = LabelConfig((0,), "reports", "frontal")
    with serving(Script(), words_reply) as server:
        labeller = Llm(client_of(server, tmp_path), None)
        told = labeller.explain(Known(), config, Sources(studies))
        assert labeller.explain(Known(dense=True), config, Sources(studies)) == {0: None}
        assert server.asked.total() == 1
    assert told[0].label == "left nodule seen"
