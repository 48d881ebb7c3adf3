"""What prepare stores is what the encoders give; what it leaves out, it counts and explains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastpref.data import encode
from fastpref.data.buckets import make_buckets
from fastpref.data.estimate import estimate_bytes
from fastpref.data.images import load_rgb, to_bucket
from fastpref.data.job import ModelShape
from fastpref.data.prepare import prepare
from fastpref.data.store import Store
from fastpref.errors import UserError

CPU = torch.device("cpu")


def run(config, **options):
    return prepare(config, progress=False, **options)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def encode_pictures(model: Path, images: list[Image.Image]):
    """Scaled posterior mean and std, by the VAE alone."""
    from fastpref.models.loading import load_vae

    vae = load_vae(model, "fp32", CPU)
    x = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor


def test_the_store_holds_what_the_pipeline_computes(recipe, rows, parquet, sdxl, clip):
    from fastpref.models.pipeline import load_pipeline
    from fastpref.models.similarity import load_clip

    made = rows(8)
    summary = run(recipe(parquet(made)))
    assert (summary.pairs, summary.images, summary.captions, summary.rejected) == (8, 16, 8, 0)
    store = Store.open(summary.store, verify=True)
    batch = store.batch([5, 2])
    winners = [load_rgb(made[5]["jpg_1"], 10**6), load_rgb(made[2]["jpg_0"], 10**6)]
    losers = [load_rgb(made[5]["jpg_0"], 10**6), load_rgb(made[2]["jpg_1"], 10**6)]
    captions = [made[5]["caption"], made[2]["caption"]]
    assert close(batch.latents_w, encode_pictures(sdxl, winners)[0])
    assert close(batch.latents_l, encode_pictures(sdxl, losers)[0])
    assert batch.posterior_std_w is None
    pipe = load_pipeline(sdxl, torch.float32, CPU)
    embeds, _, pooled, _ = pipe.encode_prompt(captions, device=CPU, do_classifier_free_guidance=False)
    assert close(batch.prompt_embeds, embeds)
    assert close(batch.pooled_prompt_embeds, pooled)
    empty, empty_pooled = store.empty_prompt()
    embeds, _, pooled, _ = pipe.encode_prompt([""], device=CPU, do_classifier_free_guidance=False)
    assert close(empty, embeds)
    assert close(empty_pooled, pooled)
    similarity = load_clip(clip)
    assert close(batch.clip_text, similarity.text(captions))
    assert close(batch.clip_image_w, similarity.images(winners))
    assert close(batch.clip_image_l, similarity.images(losers))
    assert batch.time_ids_w.tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    assert batch.label.tolist() == [1, 1]
    assert store.captions([5, 2]) == captions
    assert np.array_equal(store.clip_text_all()[np.asarray([5, 2])], batch.clip_text.numpy())


def test_sd15_has_no_pooled_embeddings_and_clip_can_be_left_out(recipe, rows, parquet, sd15):
    store = Store.open(run(recipe(parquet(rows(3)), model=str(sd15), clip=None)).store)
    batch = store.batch([0])
    assert (batch.pooled_prompt_embeds, batch.time_ids_w, batch.clip_text, batch.clip_image_w) == (None,) * 4
    assert store.empty_prompt()[1] is None
    assert batch.prompt_embeds.shape[-1] == 32
    with pytest.raises(UserError, match="no CLIP embeddings"):
        store.clip_text_all()


def test_posterior_and_flips(recipe, rows, parquet, sdxl):
    made = rows(4)
    store = Store.open(run(recipe(parquet(made), posterior=True, flips=True)).store)
    images = [load_rgb(made[i]["jpg_0" if i % 2 == 0 else "jpg_1"], 10**6) for i in range(4)]
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    (mean, std), (flipped, flipped_std) = encode_pictures(sdxl, images), encode_pictures(sdxl, mirrored)
    batch = store.batch(range(4), flip=[True, False, False, True])
    assert close(batch.latents_w, torch.stack([flipped[0], mean[1], mean[2], flipped[3]]))
    assert close(batch.posterior_std_w, torch.stack([flipped_std[0], std[1], std[2], flipped_std[3]]))
    assert close(store.batch([1]).posterior_std_w, std[1:2])
    assert close(store.batch([1], flip=[True]).latents_w, flipped[1:2])


def test_pictures_and_captions_are_encoded_and_stored_once(recipe, rows, parquet, monkeypatch):
    made = rows(6)
    for row in made[1:4]:
        row["jpg_0"], row["caption"] = made[0]["jpg_0"], made[0]["caption"]
    counts = {"images": 0, "text": 0}
    for name in counts:
        original = getattr(encode.Encoders, name)

        def counted(self, items, name=name, original=original):
            counts[name] += len(items)
            return original(self, items)

        monkeypatch.setattr(encode.Encoders, name, counted)
    summary = run(recipe(parquet(made)))
    assert (summary.images, summary.captions) == (9, 3)
    assert counts == {"images": 9, "text": 4}  # and the empty prompt
    stored = sum(
        Store(summary.store, Store.open(summary.store).manifest)._shard(name)["latents.0"].shape[0]
        for name in ("latents-00000.safetensors", "latents-00001.safetensors")
    )
    assert stored == 9
    store = Store.open(summary.store)
    assert torch.equal(store.batch([0]).latents_w, store.batch([1]).latents_l)
    assert torch.equal(store.batch([0]).prompt_embeds, store.batch([3]).prompt_embeds)


@pytest.mark.parametrize(("ties", "labels"), [("drop", [1, 1]), ("half", [1, 0.5, 1]), ("keep", [1, 1, 1])])
def test_ties_are_a_policy(ties, labels, recipe, rows, parquet):
    made = rows(3)
    made[1]["label_0"] = 0.5
    summary = run(recipe(parquet(made), ties=ties))
    store = Store.open(summary.store)
    assert store.batch(range(len(store))).label.tolist() == labels
    assert summary.ties_dropped == (ties == "drop")
    if ties != "drop":
        assert pq.read_table(summary.store / "pairs.parquet").column("label").to_pylist() == [1, 0.5, 1]
        first = [row["jpg_0"] for row in made[:2]]  # a tie keeps the order of the columns
        wanted = store.batch([0, 1]).clip_image_w
        from fastpref.models.similarity import load_clip

        assert close(wanted, load_clip(Path(recipe("x").clip)).images([load_rgb(data, 10**6) for data in first]))


def broken_rows(rows, picture):
    """Twelve rows, eight of which are broken in ways that a parquet file can hold, one unlabelled."""
    made = rows(12)
    made[0]["jpg_0"] = picture(0)[:60]
    made[1]["jpg_1"] = b"no picture"
    made[2]["caption"] = "  "
    made[3]["caption"] = None
    made[4]["label_0"] = math.nan
    made[5]["label_0"] = 2.0
    made[6]["jpg_0"] = picture(5, (200, 200))
    made[7]["jpg_1"] = None
    made[8] |= {"has_label": False, "label_0": math.nan}
    return made


REASONS = {
    0: "image cannot be decoded",
    1: "image cannot be decoded",
    2: "caption is empty",
    3: "caption is missing",
    4: "label is NaN",
    5: "label is not 0, 0.5 or 1",
    6: "image has too many pixels",
    7: "image is missing",
}


def test_unusable_records_are_listed_with_reasons(recipe, rows, parquet, picture):
    path = parquet(broken_rows(rows, picture))
    summary = run(recipe(path, max_reject_share=0.7, max_image_pixels=39_999))
    assert (summary.pairs, summary.records, summary.rejected, summary.unlabelled) == (3, 12, 8, 1)
    assert summary.reasons["image cannot be decoded"] == 2
    listed = [json.loads(line) for line in (summary.store / "rejected.jsonl").read_text().splitlines()]
    assert {entry["record"]: entry["reason"] for entry in listed} == REASONS
    assert listed[0]["where"] == "records.parquet row 0"
    assert Store.open(summary.store).record.tolist() == [9, 10, 11]


def test_too_many_rejects_fail_and_leave_no_store(recipe, rows, parquet, picture):
    path = parquet(broken_rows(rows, picture))
    config = recipe(path, max_reject_share=0.5, max_image_pixels=39_999)
    with pytest.raises(UserError, match=r"8 of 12 records .* most often 'image cannot be decoded' \(2\)") as caught:
        run(config)
    store = Path(config.store)
    assert str(store / "rejected.jsonl") in str(caught.value)
    assert len((store / "rejected.jsonl").read_text().splitlines()) == 8
    with pytest.raises(UserError, match="unfinished"):
        Store.open(store)
    with pytest.raises(UserError, match="8 of 12"):
        run(config, dry_run=True)
    assert run(config.model_copy(update={"max_reject_share": 0.7})).pairs == 3


def test_mending_a_missing_picture_and_preparing_again_works(recipe, tmp_path, picture):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"winner": "a.png", "loser": "b.png", "caption": "c"}))
    config = recipe(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="image file is missing"):
        run(config)
    (tmp_path / "b.png").write_bytes(picture(1))
    assert run(config).pairs == 1


def test_only_ties_are_no_store(recipe, rows, parquet):
    made = rows(2)
    for row in made:
        row["label_0"] = 0.5
    with pytest.raises(UserError, match="no usable pair in 2 records"):
        run(recipe(parquet(made)))


def test_latents_that_are_not_finite_are_rejected(recipe, rows, parquet, monkeypatch):
    original = encode.Encoders.images

    def overflowing(self, images):
        encoded = original(self, images)
        bright = torch.tensor([np.asarray(image)[0, 0, 0] == 7 for image in images])
        encoded["latents"][bright, 0, 0, 0] = math.inf
        return encoded

    monkeypatch.setattr(encode.Encoders, "images", overflowing)
    made = rows(6)
    pixels = np.full((32, 32, 3), 7, dtype=np.uint8)
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    made[2]["jpg_1"] = made[4]["jpg_0"] = buffer.getvalue()
    with pytest.raises(UserError, match="latents not finite"):
        run(recipe(parquet(made)))
    summary = run(recipe(parquet(made), max_reject_share=0.4))
    listed = [json.loads(line) for line in (summary.store / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["record"], entry["reason"]) for entry in listed] == [
        (2, "latents not finite"),
        (4, "latents not finite"),
    ]
    store = Store.open(summary.store)
    assert store.record.tolist() == [0, 1, 3, 5]
    assert torch.isfinite(store.batch(range(4)).latents_w).all()


def test_buckets_keep_the_pair_together_and_record_sdxl_ids(recipe, rows, parquet, picture, sdxl):
    made = rows(4)
    made[1] |= {"jpg_0": picture(10, (130, 50)), "jpg_1": picture(11, (65, 25))}
    made[2] |= {"jpg_0": picture(12, (50, 120)), "jpg_1": picture(13, (50, 120))}
    summary = run(recipe(parquet(made), buckets=True))
    store = Store.open(summary.store)
    buckets = store.manifest.buckets
    assert buckets == make_buckets(32, 4)
    sizes = [buckets[i] for i in store.bucket_ids]
    assert sizes == [(32, 32), (48, 20), (20, 48), (32, 32)]
    batch = store.batch([1])
    assert batch.latents_w.shape == batch.latents_l.shape == (1, 4, 10, 24)
    winner = to_bucket(load_rgb(made[1]["jpg_1"], 10**6), (48, 20))
    assert close(batch.latents_w, encode_pictures(sdxl, [winner])[0])
    assert batch.time_ids_w.tolist() == [[25, 65, 0, 2, 20, 48]]
    assert batch.time_ids_l.tolist() == [[50, 130, 0, 2, 20, 48]]
    with pytest.raises(ValueError, match="one bucket"):
        store.batch([0, 1])


def test_half_precision_stores_half_the_latents(recipe, rows, parquet, sdxl):
    made = rows(3)
    store = Store.open(run(recipe(parquet(made), precision="bf16")).store)
    batch = store.batch([0])
    assert (batch.latents_w.dtype, batch.prompt_embeds.dtype) == (torch.float16, torch.bfloat16)
    assert batch.clip_text.dtype == torch.float32
    exact = encode_pictures(sdxl, [load_rgb(made[0]["jpg_0"], 10**6)])[0]
    assert torch.allclose(batch.latents_w.float(), exact, atol=2e-3)


def test_a_finished_store_is_up_to_date_and_guarded(recipe, rows, parquet, monkeypatch):
    path = parquet(rows(4))
    config = recipe(path)
    first = run(config)
    before = {file.name: file.read_bytes() for file in first.store.iterdir()}
    monkeypatch.setattr(encode.Encoders, "images", None)
    again = run(config)
    assert again.up_to_date
    assert (again.pairs, again.bytes) == (first.pairs, first.bytes)
    other = recipe(path, ties="half")
    with pytest.raises(UserError, match=r"other records, model or settings.*overwrite"):
        run(other)
    assert {file.name: file.read_bytes() for file in first.store.iterdir()} == before
    monkeypatch.undo()
    (first.store / "notes.txt").write_text("mine")
    assert not run(other, overwrite=True).up_to_date
    assert Store.open(first.store, verify=True).manifest.ties == "half"
    assert (first.store / "notes.txt").read_text() == "mine"


def test_directories_that_are_not_stores_are_left_alone(recipe, rows, parquet, tmp_path):
    path = parquet(rows(2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.json").write_text('{"name": "a web app"}')
    (tmp_path / "file").write_text("x")
    for name, message in (("mine", "not a store"), ("file", "is a file"), ("file/below", "cannot create")):
        with pytest.raises(UserError, match=message):
            run(recipe(path, store=str(tmp_path / name)), overwrite=True)
    assert (tmp_path / "mine/manifest.json").read_text() == '{"name": "a web app"}'


def test_a_resolution_the_vae_cannot_take_is_refused(recipe, rows, parquet):
    with pytest.raises(UserError, match="multiple of 4"):
        run(recipe(parquet(rows(1)), resolution=8 * 5, buckets=True, store="x").model_copy(update={"resolution": 42}))


def test_dry_run_writes_nothing_and_estimates_the_bytes(recipe, rows, parquet, picture):
    made = rows(40)
    made[3]["caption"] = ""
    made[4]["label_0"] = 0.5
    config = recipe(parquet(made), max_reject_share=0.1)
    summary = run(config, dry_run=True)
    assert not Path(config.store).exists()
    assert (summary.pairs, summary.images, summary.captions) == (38, 76, 38)
    assert (summary.rejected, summary.ties_dropped) == (1, 1)
    assert summary.reasons == {"caption is empty": 1}
    assert 0 < summary.hours < 1
    actual = run(config)
    payload = sum(
        file.stat().st_size
        for kind in ("latents", "text", "clip")
        for file in actual.store.glob(f"{kind}*.safetensors")
    )
    assert summary.bytes == pytest.approx(payload, rel=0.1)
    text = str(summary)
    assert "38 pairs of 40 records (1 rejected, 1 ties dropped, 0 unlabelled)" in text
    assert "hours on one rank" in text


def test_pick_a_pic_v2_at_1024_stays_under_400_gb():
    """959,040 records and 58,960 prompts are the data set's own numbers; no picture shared is the worst case."""
    sdxl = ModelShape(
        vae_scale_factor=8,
        unet_downsampling=4,
        latent_channels=4,
        scaling_factor=0.13025,
        shift_factor=0.0,
        text_tokens=77,
        text_width=768 + 1280,
        pooled_width=1280,
        clip_width=1024,
    )
    records, captions = 959_040, 58_960
    size = estimate_bytes(sdxl, {(1024, 1024): 2 * records}, captions, records, dtype="float16", text_dtype="bfloat16")
    assert size.latents == 2 * records * 4 * 128 * 128 * 2 == 251_406_581_760
    assert size.text == (captions + 1) * (77 * 2048 + 1280) * 2 == 18_746_767_872
    assert size.clip == (2 * records + captions + 1) * 1024 * 4
    assert size.total < 279e9 < 400e9
    doubled = estimate_bytes(
        sdxl, {(1024, 1024): records}, captions, records, dtype="float16", text_dtype="bfloat16", flips=True
    )
    assert doubled.latents == size.latents  # mirrored latents cost as much as sharing every picture once saves
