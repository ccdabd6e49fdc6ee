"""Where a checkpoint is: a folder, a file, or a name on the Hugging Face hub."""

from pathlib import Path

from p2pz.weights.folder import open_folder
from p2pz.weights.hub import is_hub_id, open_from_hub
from p2pz.weights.reading import Checkpoint, CheckpointError
from p2pz.weights.single_file import open_single_file


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Read a checkpoint of any supported kind; its tensors stay in their files until they are used.

    Args:
        source: a folder in the diffusers layout, a single safetensors file, or the hub's name of a folder, such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5". What exists here goes before the hub.

    Raises:
        CheckpointError: it is missing, unreadable or of another family; names the file at fault.
    """
    path = Path(source).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # the name is too long for either
        is_folder = is_file = False
    if is_folder:
        return open_folder(path.resolve())
    if is_file:
        return open_single_file(path.absolute())
    if is_hub_id(str(source)):
        return open_from_hub(str(source))
    raise CheckpointError(
        f"model {path} does not exist: give a Stable Diffusion folder in the diffusers layout, a safetensors file, "
        "the hub's name of a model (owner/name), or none for the bundled model"
    )
