"""A loaded Stable Diffusion: its modules and constants, and the few calls every method is made of."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from p2pz import schedule, text
from p2pz.attention import Attend, Hooks, plain
from p2pz.engine import Graphs, Tensors, explain_out_of_memory
from p2pz.unet import Conditioning, UNet, UNetConfig
from p2pz.vae import VAE, VAEConfig
from p2pz.weights import (
    MINI_FOLDER,
    Checkpoint,
    CheckpointError,
    Component,
    fill,
    find_tokenizer,
    mini_world,
    open_checkpoint,
    printable,
    read_json,
    reason,
)

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

GIB = 2**30
PREDICTION_TYPES = "epsilon", "v_prediction"


@dataclass(frozen=True)
class Model:
    """A Stable Diffusion checkpoint in memory. All parameters are frozen.

    The UNet is where the work is done. With a memory budget, the VAE and the text encoder may lie in host memory.

    Attributes:
        folder: where it was loaded from.
        unet, vae, text_encoder, tokenizer: the parts.
        prediction_type: what the UNet predicts, `"epsilon"` or `"v_prediction"`.
        text_fingerprint: short name of the text encoder's weights; directions carry it.
        fingerprint: short name of all weights and of what the UNet predicts; inversions carry it.
        tokenizer_2: of the second text encoder, if there are two (SDXL); `text_encoder` is then a list of both.
        zeros_for_nothing: whether zeros stand for an empty negative prompt of SDXL.
        max_memory: bytes of GPU memory that it may take, see `p2pz.memory`; None: any.
        checkpoint: the gradient of the map guidance computes activations again instead of keeping them.
        graphs: work that was recorded for repetition on a GPU.
    """

    folder: Path
    unet: UNet
    vae: VAE
    text_encoder: CLIPTextModel | nn.ModuleList
    tokenizer: CLIPTokenizer
    prediction_type: str
    text_fingerprint: str
    fingerprint: str
    tokenizer_2: CLIPTokenizer | None = None
    zeros_for_nothing: bool = True
    max_memory: int | None = None
    checkpoint: bool = False
    graphs: Graphs = field(default_factory=Graphs, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the UNet's weights are, and where all work is done."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the forward passes."""
        return self.unet.conv_in.weight.dtype

    @property
    def native_size(self) -> int:
        """Width and height in pixels of the images the UNet was trained on; other sizes work."""
        return self.unet.config.sample_size * self.vae.config.downsampling

    @property
    def text_encoders(self) -> list[CLIPTextModel]:
        """The one, or SDXL's two."""
        return list(self.text_encoder) if self.tokenizer_2 is not None else [self.text_encoder]

    @property
    def text_shape(self) -> tuple[int, int]:
        """Rows and width of the text states of a sentence, see `encode_text`."""
        unet = self.unet.config
        return self.tokenizer.model_max_length + (unet.pooled_channels > 0), unet.context_channels

    @property
    def is_mini(self) -> bool:
        """Whether this is the bundled model, which knows only its cartoon world."""
        return self.folder == MINI_FOLDER

    def split(self, record: bool = True) -> tuple[Graphs, Model]:
        """What runs steps, and the model for these steps, without it.

        Graphs hold the steps that they have recorded: were the model in these to hold the graphs, the circle would keep
        the GPU's memory when the model is let go of.

        Args:
            record: False: steps run one by one.
        """
        return self.graphs if record else Graphs(record=False), replace(self, graphs=Graphs())

    @contextlib.contextmanager
    def at_work(self, module: nn.Module) -> Iterator[Graphs]:
        """Within, a part that lies in host memory is on the GPU; what was recorded makes room for it.

        Args:
            module: the VAE or the text encoder.

        Yields:
            What to run it with: a part that comes and goes is never recorded, since its weights' addresses change.
        """
        if lies_on(module, self.device):
            yield self.graphs
            return
        self.graphs.clear()
        tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
        at_home = [dict(table) for table in tables]
        try:
            for table in tables:
                table.update((name, x.to(self.device)) for name, x in table.items() if x is not None)
            yield Graphs(record=False)
        finally:
            for table, tensors in zip(tables, at_home, strict=True):
                table.update(tensors)
            torch.cuda.empty_cache()

    def encode_text(self, sentences: Sequence[str]) -> Tensor:
        """Text states `[len(sentences), 77, d]`; SDXL's have a row more, see `p2pz.text.encode_text_twice`.

        Raises ValueError if there are no sentences, or something else. Warns of words that the bundled model has never
        seen.
        """
        for sentence in sentences:
            text.check_text(sentence)
        unknown = set(re.findall(r"[^\W\d_]+", " ".join(sentences).lower())) - set(mini_world.VOCABULARY)
        if self.is_mini and unknown:
            warnings.warn(
                f"the bundled model does not know {', '.join(sorted(unknown))}; "
                f"all its words: {' '.join(mini_world.VOCABULARY)}",
                stacklevel=4,
            )
        with self.at_work(self.text_encoder) as graphs:
            if self.tokenizer_2 is not None:
                tokenizers = self.tokenizer, self.tokenizer_2
                return text.encode_text_twice(tokenizers, self.text_encoder, sentences)
            return text.encode_text(self.tokenizer, self.text_encoder, sentences, graphs)

    def encode_negative(self, sentences: Sequence[str]) -> Tensor:
        """Text states of negative prompts. Those of an empty one are zeros for SDXL as it was trained."""
        states = self.encode_text(sentences)
        if self.tokenizer_2 is not None and self.zeros_for_nothing:
            states[[not sentence for sentence in sentences]] = 0
        return states

    @torch.no_grad()
    def encode_image(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents of images.

        Args:
            images: `[B, 3, H, W]` in [-1, 1], H and W multiples of `vae.config.downsampling`.
            generator: sample the posterior with it; the posterior's mean is taken without one.

        Returns:
            `[B, 4, h, w]` float32, about unit variance.
        """
        latents, log_variance = self._through_vae("encode", images)
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            latents = latents + (0.5 * log_variance).exp() * noise
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` float32 in [-1, 1] of scaled latents `[B, 4, h, w]`."""
        (images,) = self._through_vae("decode", latents / self.vae.config.scaling_factor)
        return images.clamp(-1, 1)

    def _through_vae(self, way: str, inputs: Tensor) -> Tensors:
        """What the VAE's `encode` or `decode` makes of a batch, float32; if a half precision overflows, in float32.

        Raises ValueError if the results are not finite all the same.
        """

        def run(graphs: Graphs, vae: VAE) -> Tensors:
            batch = inputs.to(self.device, vae.quant_conv.weight.dtype, memory_format=torch.channels_last)
            function = vae.encode if way == "encode" else lambda x: [vae.decode(x)]  # must not hold the model
            made = [graphs.call((way, id(vae)), function, [x]) for x in batch.split(1)]  # each takes much memory
            return [torch.cat(parts).float() for parts in zip(*made, strict=True)]

        with self.at_work(self.vae) as graphs:
            results = run(graphs, self.vae)
            if _finite(results):
                return results
            if self.vae.quant_conv.weight.dtype != torch.float32:
                warnings.warn(
                    f"the VAE of {self.folder} overflows in {self.vae.quant_conv.weight.dtype}, so it works in float32",
                    stacklevel=2,
                )
                wide = copy.deepcopy(self.vae).float()
                wide.fuse()
                results = run(Graphs(record=False), wide)
        if _finite(results):
            return results
        raise ValueError(
            f"the VAE of {self.folder} {way}s to infinite or NaN numbers: its file is damaged, or a strength or a "
            "guidance is too large"
        )

    @torch.no_grad()
    def condition(self, timesteps: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Conditioning:
        """What the UNet is told besides latents, see `UNet.condition`.

        Args:
            timesteps: `[T]`.
            context: text states, as `encode_text` returns them.
            size: height and width of the latents, of which only SDXL is told.
        """
        timesteps, context = timesteps.to(self.device), context.to(self.device, self.dtype)
        if not self.unet.config.pooled_channels or size is None:
            return self.unet.condition(timesteps, context)
        height, width = (side * self.vae.config.downsampling for side in size)
        return self.unet.condition(timesteps, context, (height, width))

    def predict(
        self, latents: Tensor, conditioning: Conditioning, attend: Attend | Hooks = plain, checkpoint: bool = False
    ) -> Tensor:
        """Output of the UNet, see `to_noise` for what it means.

        Args:
            latents: `[B, 4, h, w]` float32.
            conditioning: timesteps and texts, see `condition`; shifts `[S]` or `[B, S]`.
            attend: what happens in every attention layer, or `Hooks` of that and of features, see `p2pz.attention`.
            checkpoint: keep less for a backward pass, see `UNet.predict`.

        Returns:
            `[B, 4, h, w]` float32.
        """
        inputs = latents.to(self.dtype, memory_format=torch.channels_last)
        prediction = self.unet.predict(inputs, conditioning, attend, checkpoint)
        return prediction.to(torch.float32, memory_format=torch.contiguous_format)

    def to_noise(self, prediction: Tensor, latents: Tensor, alpha: Tensor | float) -> Tensor:
        """The noise (epsilon) that a prediction for latents stands for; `alpha` is their alpha-bar."""
        return schedule.to_epsilon(prediction, latents, alpha, self.prediction_type)


def _finite(results: Tensors) -> bool:
    return all(bool(result.isfinite().all()) for result in results)


def loaded(model: Model | None) -> Model:
    """The model, None being the default one. Raises ValueError for anything else, such as the name of one."""
    if not isinstance(model, Model | None):
        raise ValueError(f"a model is what p2pz.load returns, for instance p2pz.load({str(model)!r}), not its name")
    return model or load()


def find_device(name: str | torch.device | None = None) -> torch.device:
    """A device by name; None is CUDA if there is a GPU, else the CPU. Raises ValueError if there is no such device."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, not {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"p2pz works on the CPU and on NVIDIA GPUs: device must be cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"there is no device {device}: PyTorch finds {gpus or 'no'} GPU{'s' if gpus > 1 else ''}")
    return device


@torch.inference_mode(False)  # weights that are made there cannot serve a gradient elsewhere
@explain_out_of_memory
def load(
    source: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    max_memory: float | None = None,
    prediction_type: str | None = None,
    tokenizer: str | Path | None = None,
) -> Model:
    """Load a checkpoint of Stable Diffusion 1.x, 2.x or XL from safetensors.

    Args:
        source: a folder in the diffusers layout (`unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`,
            and for XL `text_encoder_2/`, `tokenizer_2/`); a single file in the original layout, whose averaged (EMA)
            copies are left aside; or the name of a folder on the Hugging Face hub (`owner/name`), of which only what
            the local cache lacks is downloaded. None: what the environment variable P2PZ_MODEL names, or else the
            bundled mini model.
        device: None takes the GPU if there is one.
        dtype: None takes float16 on a GPU and float32 on the CPU. XL's VAE, which overflows in float16, stays in
            float32 unless its `config.json` says that it need not (`force_upcast`).
        max_memory: GiB of GPU memory that p2pz may take for weights, activations and recorded work; CUDA itself takes
            about 0.5 GiB more. Work that would take more is done more slowly: on fewer images at once, with the text
            encoder and the VAE in host memory in between, and computing activations twice. None: no limit.
        prediction_type: what the UNet predicts, `"epsilon"` or `"v_prediction"`. None takes what the folder or the
            file's metadata says. Single files of Stable Diffusion 1.x and XL that say nothing predict epsilon; those
            of 2.x are probed with noise, and a warning tells the result.
        tokenizer: a folder with `vocab.json` and `merges.txt`. None takes the checkpoint's own; a single file has
            none, so for it CLIP's from the hub's local cache, or else from the hub.

    Returns:
        The frozen model.

    Raises:
        ValueError: no such device or prediction type, or a budget that is too small or for the CPU.
        CheckpointError: the source is missing, of another family, or its tensors do not fit; the message names the
            file and what is wrong with it.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type must be epsilon or v_prediction, not {prediction_type!r}")
    device = find_device(device)
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float16, bfloat16, float32 or float64, not {dtype!r}")
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    budget = None if max_memory is None else _budget(max_memory, device)
    checkpoint = open_checkpoint(source or os.environ.get("P2PZ_MODEL") or MINI_FOLDER)
    told = checkpoint.prediction_type
    if checkpoint.scheduler is not None:
        told = _read_prediction_type(checkpoint.scheduler)
    prediction_type = prediction_type or told

    unet = _load_module(UNet, UNetConfig, checkpoint.unet)
    vae = _load_module(VAE, VAEConfig, checkpoint.vae)
    text_encoder, tokenizers = _load_text(checkpoint, tokenizer)
    text_fingerprint = text.fingerprint(text_encoder)
    fingerprint = text.fingerprint(unet, vae)
    _check_text(text_encoder, unet.config, checkpoint.path)
    weights = sum(parameter.numel() for parameter in unet.parameters()) * dtype.itemsize
    if budget is not None and weights > budget:
        raise ValueError(
            f"max_memory is {max_memory:.3g} GiB, but the weights of the UNet alone take {weights / GIB:.3g}: raise it"
        )
    for part in (checkpoint.unet, checkpoint.vae, checkpoint.text_encoder, checkpoint.text_encoder_2):
        if part is not None:
            part.tensors.clear()  # so that a file's pages leave host memory once its module lies elsewhere
    home = device if budget is None else torch.device("cpu")  # until a plan calls the others to the GPU
    unet, vae = _place(unet, device, dtype), _place(vae, home, vae_dtype(unet.config, vae.config, dtype))
    for module in (unet, vae):
        module.fuse()
    model = Model(
        folder=checkpoint.path,
        unet=unet,
        vae=vae,
        text_encoder=_place(text_encoder, home, dtype),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1] if len(tokenizers) > 1 else None,
        zeros_for_nothing=checkpoint.zeros_for_nothing,
        prediction_type=prediction_type or "epsilon",
        text_fingerprint=text_fingerprint,
        fingerprint=f"{fingerprint}-{text_fingerprint}",
        max_memory=budget,
    )
    if prediction_type is None:
        model = replace(model, prediction_type=_probe_prediction_type(model))
    if model.prediction_type != "epsilon":
        model = replace(model, fingerprint=f"{model.fingerprint}-{model.prediction_type}")
    is_sd2 = unet.config.linear_projection and not unet.config.pooled_channels
    if checkpoint.scheduler is None and is_sd2 and model.prediction_type == "v_prediction":
        unet.config = replace(unet.config, sample_size=96)  # which no tensor tells of Stable Diffusion 2's 768 x 768
    return model


def _budget(max_memory: float, device: torch.device) -> int:
    """A budget in GiB as bytes. Raises ValueError."""
    if device.type != "cuda":
        raise ValueError("max_memory (--max-memory) limits the memory of a GPU, but this runs on the CPU: leave it out")
    if not 0 < max_memory < float("inf"):
        raise ValueError(f"max_memory must be a number of GiB above zero, not {max_memory}")
    return int(max_memory * GIB)


def _load_module(module_type: type, config_type: type, component: Component) -> nn.Module:
    try:
        config = config_type.from_json(component.config)
        with torch.device("meta"):
            module = module_type(config)
    except KeyError as error:
        raise CheckpointError(f"{component.config_path} lacks {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{component.config_path} describes no Stable Diffusion: {reason(error)}") from None
    fill(module, component.tensors, component.path, component.layout)
    return module.eval().requires_grad_(False)


def lies_on(module: nn.Module, device: torch.device) -> bool:
    """Whether all of a part is on a device; after a move that was stopped half-way, some of it is not."""
    return all(parameter.device == device for parameter in module.parameters())


def vae_dtype(unet: UNetConfig, vae: VAEConfig, dtype: torch.dtype) -> torch.dtype:
    """What a VAE works in beside a UNet of some dtype: SDXL's overflows in float16, unless its file says otherwise."""
    overflows = unet.pooled_channels > 0 and vae.force_upcast and dtype == torch.float16
    return torch.float32 if overflows else dtype


def _load_text(
    checkpoint: Checkpoint, folder: str | Path | None
) -> tuple[CLIPTextModel | nn.ModuleList, list[CLIPTokenizer]]:
    """The text encoder and its tokenizer, or the two of each that SDXL has; `folder` is the caller's tokenizer."""
    given = None if folder is None else Path(folder).expanduser()
    encoder = text.load_text_encoder(checkpoint.text_encoder)
    first = given or checkpoint.tokenizer or find_tokenizer()
    tokenizers = [text.load_tokenizer(first, encoder, checkpoint.pad_token)]
    if checkpoint.text_encoder_2 is None:
        return encoder, tokenizers
    second = text.load_text_encoder(checkpoint.text_encoder_2, projection=True)
    pad_token = checkpoint.pad_token_2 if given is None else "!"  # two encoders share a tokenizer but for the padding
    tokenizers.append(text.load_tokenizer(given or checkpoint.tokenizer_2 or first, second, pad_token))
    return nn.ModuleList([encoder, second]), tokenizers


def _check_text(encoder: CLIPTextModel | nn.ModuleList, unet: UNetConfig, path: Path) -> None:
    """Raise CheckpointError if the text encoder gives another thing than the UNet reads."""
    encoders = list(encoder) if isinstance(encoder, nn.ModuleList) else [encoder]
    width = sum(each.config.hidden_size for each in encoders)
    if width != unet.context_channels:
        raise CheckpointError(
            f"the text encoder in {path} gives states of width {width}, but its UNet reads {unet.context_channels}"
        )
    pooled = encoders[1].config.projection_dim if len(encoders) > 1 else 0
    if pooled != unet.pooled_channels:
        raise CheckpointError(
            f"the second text encoder in {path} gives pooled states of width {pooled}, "
            f"but its UNet reads {unet.pooled_channels}"
        )


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Bring a module to a device and dtype, convolutions channels-last, one tensor at a time.

    A tensor goes to the device as it lies in the memory-mapped file and is converted there; `module.to(device, dtype)`
    would convert it in host memory. One that is already as wanted stays in the mapped file.
    """

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(dtype, memory_format=torch.channels_last if tensor.ndim == 4 else torch.preserve_format)

    return module._apply(convert)


def _read_prediction_type(path: Path) -> str:
    """Check that a scheduler's file describes Stable Diffusion's noise schedule, and return what the UNet predicts."""
    config = read_json(path)
    scheduler = str(config.get("_class_name"))
    if re.match("EDM|Flow", scheduler):
        raise CheckpointError(
            f"{path}: {printable(scheduler)} is for models of another noise schedule than Stable Diffusion's: "
            "give a model that was trained with that"
        )
    expected = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": schedule.TRAINING_STEPS,
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
        "use_flow_sigmas": False,
    }
    for key, value in expected.items():
        if key not in config and key.startswith("beta_"):  # where diffusers would take those of another schedule
            raise CheckpointError(
                f'{path} lacks {key}: if the model was trained as Stable Diffusion is, add "{key}": {json.dumps(value)}'
            )
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{path}: {key} is {printable(str(config[key]))}, but Stable Diffusion's is {value}: "
                "give a model that was trained with that"
            )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise CheckpointError(
            f"{path}: prediction_type {printable(str(prediction_type))} is not supported (epsilon and v_prediction are)"
        )
    return prediction_type


@torch.no_grad()
def _probe_prediction_type(model: Model) -> str:
    """Find out from its answer to noise what a UNet predicts, and warn that nothing else tells.

    At the last training step latents are nearly all noise. A UNet that predicts epsilon gives them back; one that
    predicts v = sqrt(a) * epsilon - sqrt(1 - a) * image, with alpha-bar a = 0.005, gives an image it makes up, negated.
    So the noise's share in the answer is near 1 or near 0.

    Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), section 4, for v.
    """
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(model.device)
    timestep = torch.tensor([schedule.TRAINING_STEPS - 1])
    answer = model.predict(noise, model.condition(timestep, model.encode_text([""])))
    share = ((answer * noise).sum() / noise.square().sum()).item()
    if not math.isfinite(share):
        raise CheckpointError(f"{model.folder}: its UNet answers with {share}, so the file is damaged")
    found = "epsilon" if share > 0.5 else "v_prediction"
    warnings.warn(
        f"{model.folder} does not say what its UNet predicts; a probe with noise finds {found}. "
        f'Tell it with prediction_type="{found}" (--prediction-type), or the other if images come out wrong',
        stacklevel=4,
    )
    return found
