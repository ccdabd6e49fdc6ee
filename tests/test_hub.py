"""Names on the Hugging Face hub: against a small hub of our own on this machine, with a cache of our own."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import p2pz
from p2pz.weights import MINI_FOLDER, CheckpointError, find_tokenizer, open_checkpoint
from p2pz.weights.hub import TOKENIZER, is_hub_id, needed_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"


class Hub(BaseHTTPRequestHandler):
    """Serves `server.repositories` (name -> folder) as far as the client asks, and remembers what was downloaded."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].removeprefix("/api/models").removeprefix("/")
        owner, name, *rest = path.split("/")
        folder = self.server.repositories.get(f"{owner}/{name}")
        files = sorted(x for x in folder.rglob("*") if x.is_file()) if folder else []
        if folder is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif not self.path.startswith("/api/"):
            file = folder.joinpath(*rest[2:])
            if not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            if self.command == "GET":
                self.server.downloaded.append("/".join(rest[2:]))
            self.answer(200, file.read_bytes(), {"ETag": f'"{hash(file) % 2**64:x}"', "X-Repo-Commit": COMMIT})
        elif rest[:1] == ["tree"]:
            rows = [{"type": "file", "path": x.relative_to(folder).as_posix(), "size": x.stat().st_size} for x in files]
            self.answer(200, json.dumps([row | {"oid": "0" * 40} for row in rows]).encode())
        else:
            rows = [{"rfilename": x.relative_to(folder).as_posix()} for x in files]
            self.answer(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": rows}).encode())

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub without repositories, which the client asks, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.downloaded, server.cache = {}, [], tmp_path / "cache"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def repository(hub, tmp_path):
    """The bundled model as `owner/mini`, among other files that a repository has."""
    folder = Path(shutil.copytree(MINI_FOLDER, tmp_path / "served"))
    others = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "README.md"]
    others += ["unet/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_flax_model.msgpack"]
    others += ["safety_checker/model.safetensors", "model-pruned.safetensors", "model.ckpt"]
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    hub.repositories["owner/mini"] = folder
    return folder


def offline(hub, monkeypatch, how):
    if how == "told":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.shutdown()
        hub.server_close()


def same(model, folder=MINI_FOLDER):
    expected = p2pz.load(folder, device="cpu").unet.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.unet.state_dict().items())


@pytest.mark.parametrize("how", ["told", "unreachable"])
def test_downloads_what_is_needed_and_then_works_offline(how, hub, repository, monkeypatch):
    assert same(p2pz.load("owner/mini", device="cpu"))
    needed = {f"{part}/config.json" for part in ("unet", "vae", "text_encoder")} | {"scheduler/scheduler_config.json"}
    needed |= {UNET, UNET.replace("unet", "vae"), "text_encoder/model.safetensors", "model_index.json"}
    assert needed <= set(hub.downloaded) and len(hub.downloaded) == len(set(hub.downloaded))
    assert {name.split("/")[0] for name in set(hub.downloaded) - needed} == {"tokenizer"}
    hub.downloaded.clear()
    monkeypatch.setenv("P2PZ_MODEL", "owner/mini")
    assert same(p2pz.load(device="cpu")) and hub.downloaded == []
    offline(hub, monkeypatch, how)
    assert same(p2pz.load("owner/mini", device="cpu"))


@pytest.mark.parametrize("how", ["told", "unreachable"])
def test_neither_cached_nor_reachable(how, hub, repository, monkeypatch):
    offline(hub, monkeypatch, how)
    with pytest.raises(
        CheckpointError, match=r"owner/mini is no folder here; on the hub, it is not in the local cache"
    ):
        p2pz.load("owner/mini")


def test_what_the_cache_lacks_is_downloaded(hub, repository, monkeypatch):
    p2pz.load("owner/mini", device="cpu")
    (cached,) = hub.cache.glob(f"models--owner--mini/snapshots/{COMMIT}/vae/*.safetensors")
    cached.resolve().unlink()
    cached.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=r"does not hold all of it \(.*vae has no diffusion_pytorch_model"):
            p2pz.load("owner/mini", device="cpu")
    hub.downloaded.clear()
    assert same(p2pz.load("owner/mini", device="cpu"))
    assert hub.downloaded == ["vae/diffusion_pytorch_model.safetensors"]


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def snapshot(hub):
    return hub.cache / f"models--owner--mini/snapshots/{COMMIT}"


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "tokenizer_2", "text_encoder", "text_encoder_2"])
def test_folders_that_the_cache_lacks_are_downloaded(part, hub, repository, monkeypatch):
    """Of what has the parts of Stable Diffusion XL, none of which is another family's without one."""
    change_json(repository / "unet/config.json", addition_embed_type="text_time")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(repository / name, repository / f"{name}_2")
    open_checkpoint("owner/mini")
    expected = sorted(f"{part}/{path.name}" for path in (snapshot(hub) / part).iterdir())
    for path in (snapshot(hub) / part).iterdir():
        path.resolve().unlink()
    shutil.rmtree(snapshot(hub) / part)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=rf"does not hold all of it \(.*/{part}/\w*.json is missing"):
            open_checkpoint("owner/mini")
    hub.downloaded.clear()
    open_checkpoint("owner/mini")
    assert sorted(hub.downloaded) == expected


@pytest.mark.parametrize("how", ["online", "offline"])
@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json"])
def test_another_family_in_the_cache_is_refused_as_such(name, how, hub, repository, monkeypatch):
    """Not as something that the hub could mend."""
    open_checkpoint("owner/mini")
    change_json(snapshot(hub) / name, in_channels=9, _class_name="KandinskyV22Pipeline" if "index" in name else "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    with pytest.raises(CheckpointError, match=f"mini/snapshots/{COMMIT} looks like (an inpainting model|Kandinsky)"):
        open_checkpoint("owner/mini")


def test_half_precision_in_the_cache_is_used(hub, repository, monkeypatch):
    """Who fetched the float16 variant with another program downloads nothing."""
    for path in repository.glob("*/*.safetensors"):
        if path.parent.name in ("unet", "vae", "text_encoder") and path.suffixes == [".safetensors"]:
            halves = {name: tensor.half() for name, tensor in load_file(path).items()}
            save_file(halves, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
            path.unlink()
    assert p2pz.load("owner/mini", device="cpu").unet.conv_in.weight.dtype == torch.float32
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.downloaded
    shutil.copy(MINI_FOLDER / UNET, repository / UNET)
    hub.downloaded.clear()
    p2pz.load("owner/mini", device="cpu")
    assert hub.downloaded == []


def test_shards(hub, repository):
    tensors = load_file(repository / UNET)
    (repository / UNET).unlink()
    (repository / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = dict(list(tensors.items())[:50]), dict(list(tensors.items())[50:])
    for name, half in zip(names, halves, strict=True):
        save_file(half, repository / "unet" / name)
    (repository / "unet" / names[0].replace(".safe", ".fp16.safe")).write_bytes(b"not needed")
    weight_map = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (repository / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    assert same(p2pz.load("owner/mini", device="cpu"))
    assert sorted(name for name in hub.downloaded if "-of-" in name) == [f"unet/{name}" for name in names]


def test_unknown_models(hub):
    with pytest.raises(CheckpointError, match=r"owner/nothing is no folder here, and the hub has no such model"):
        p2pz.load("owner/nothing")
    for source in ("nothing", "./owner/mini", "owner/mini/unet", "owner/mini.safetensors", "owner/mini.ckpt"):
        with pytest.raises(CheckpointError, match="does not exist: give a Stable Diffusion folder"):
            p2pz.load(source)
    assert is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5") and is_hub_id("CompVis/stable-diffusion-v1.4_x")


def test_a_folder_here_goes_before_the_hub(hub, repository):
    shutil.copytree(MINI_FOLDER, "owner/mini")
    assert p2pz.load("owner/mini", device="cpu").folder == Path("owner/mini").resolve() and hub.downloaded == []


def test_other_families_are_refused_before_their_weights_are_downloaded(hub, repository):
    xl = {"in_channels": 4, "addition_embed_type": "text_time", "cross_attention_dim": 1280}
    for name, changes, message in (
        ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
        ("unet/config.json", xl, "the refiner of Stable Diffusion XL"),
        ("model_index.json", {"_class_name": "KandinskyV22Pipeline"}, "Kandinsky"),
    ):
        change_json(repository / name, **changes)
        with pytest.raises(CheckpointError, match=f"owner/mini looks like {message}"):
            p2pz.load("owner/mini")
        assert hub.downloaded == ["model_index.json", "unet/config.json"][: 2 if "unet" in name else 1]
        shutil.rmtree(hub.cache)
        hub.downloaded.clear()


def test_needed_files_of_stable_diffusion_xl():
    names = [f"{part}/{name}.safetensors" for part in XL_PARTS for name in ("model", "model.fp16")]
    names += [f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in ("vocab.json", "merges.txt")]
    found = set(needed_files([*names, "text_encoder_2/config.json", "text_encoder_2/flax_model.msgpack"], "a/b"))
    wanted = {"text_encoder_2/model.safetensors", "text_encoder_2/config.json", "tokenizer_2/vocab.json"}
    assert wanted <= found and not any(name.endswith((".fp16.safetensors", ".msgpack")) for name in found)


XL_PARTS = "unet", "vae", "text_encoder", "text_encoder_2"


def test_needed_files():
    base = ["tokenizer/vocab.json", "tokenizer/merges.txt", "README.md"]
    parts = [f"{part}/{name}.safetensors" for part in ("vae", "text_encoder") for name in ("model", "model.fp16")]
    found = needed_files([*base, *parts, "unet/diffusion_pytorch_model.fp16.safetensors"], "a/b")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in found and "vae/model.fp16.safetensors" not in found
    assert "README.md" not in found and {"tokenizer/merges.txt", "unet/config.json"} <= set(found)
    with pytest.raises(
        CheckpointError, match=r"a/b on the hub has no unet as safetensors; download one of v1.safetens"
    ):
        needed_files([*base, *parts, "unet/diffusion_pytorch_model.bin", "v1.safetensors"], "a/b")
    with pytest.raises(CheckpointError, match="a/b looks like Stable Diffusion 3, Flux"):
        needed_files(["transformer/config.json"], "a/b")


def test_tokenizer_from_the_hub_and_then_from_the_cache(hub, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"a single file has no tokenizer: give a folder .* as tokenizer="):
        find_tokenizer()
    hub.repositories[TOKENIZER] = MINI_FOLDER / "tokenizer"
    folder = find_tokenizer()
    assert sorted(hub.downloaded) == ["merges.txt", "vocab.json"] == sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_tokenizer() == folder
    shutil.rmtree(hub.cache)
    with pytest.raises(
        CheckpointError, match=r"clip-vit-large-patch14 is not in the local cache, and the hub cannot be"
    ):
        find_tokenizer()
