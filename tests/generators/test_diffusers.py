"""One-step diffusion models beside diffusers' own pipelines; folders that are refused."""

import json
import shutil
import socket
import sys

import pytest
import torch

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig
from copgen_fast.errors import UsageError
from copgen_fast.pairs.format import read_complete_index
from copgen_fast.runtime import artifacts
from copgen_fast.train import main
from tests.conftest import TINY

diffusers = pytest.importorskip("diffusers")
fixtures = pytest.importorskip("tests.helpers.diffusers_fixtures")
LATENT = ("turbo", "large", "sdxs", "lcm")
KINDS = ("consistency", "conditional", "published", *LATENT)
LABELS = torch.tensor([2, 0, 1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each kind's folder, pipeline and generator, made once, without any connection."""
    folder, found = tmp_path_factory.mktemp("diffusers"), {}
    prompts = fixtures.prompts_file(folder)

    def make(kind):
        if kind not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it connects to a network"))
                path = folder / kind
                if kind in LATENT:
                    pipeline, options = fixtures.turbo(path, kind), [f"prompts={prompts}"]
                else:
                    blocks = fixtures.PUBLISHED if kind == "published" else fixtures.PLAIN
                    classes = None if kind == "consistency" else 5
                    pipeline, options = fixtures.consistency(path, classes, blocks=blocks), []
                pipeline.set_progress_bar_config(disable=True)
                name = "turbo" if options else "consistency"
                found[kind] = path, pipeline, generators.build(name, path, options)
        return found[kind]

    return make


def drawn(generator, dtype=torch.float32):
    return torch.randn(3, generator.latent_dim, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_the_pipelines_own_step(made, kind):
    _, pipeline, generator = made(kind)
    z, labels = drawn(generator), LABELS if generator.classes else None
    options = {"num_inference_steps": 1, "latents": z.view(3, *generator.latent_shape), "output_type": "pt"}
    if kind in LATENT:
        scale = 8.5 if kind == "lcm" else 0.0
        options |= {"prompt": [fixtures.PROMPTS[label] for label in labels], "guidance_scale": scale}
    else:
        options |= {"class_labels": labels, "batch_size": 3}
    expected = 2 * pipeline(**options).images - 1
    images = generator(z, labels)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=2e-6)
    assert images.std() > 0.05, "the case must not be clipped to one colour"
    assert torch.equal(images, generator(z, labels))
    if generator.classes:
        assert not torch.allclose(generator(z, labels.roll(1)), images, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "DDIM", "LCM", "DPMSolverMultistep"])
def test_a_schedulers_only_step_is_its_numbers(name, prediction):
    from copgen_fast.generators._diffusers import one_step

    if (name, prediction) == ("EulerAncestralDiscrete", "sample"):
        pytest.skip("diffusers lacks it")
    clips = {"clip_sample": False} if name in ("DDIM", "LCM") else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**fixtures.TURBO, prediction_type=prediction, **clips)
    step = one_step(scheduler)
    scheduler.set_timesteps(1)
    random = torch.Generator().manual_seed(0)
    z, output = torch.randn(2, 2, 4, 3, 3, generator=random)
    noise = z * scheduler.init_noise_sigma
    torch.testing.assert_close(scheduler.scale_model_input(noise, scheduler.timesteps[0]), step.scale * noise)
    expected = scheduler.step(output, scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(step.of_output * output + step.of_noise * noise, expected, rtol=1e-4, atol=1e-4)


def test_an_lcm_is_told_the_guidance_and_a_step_may_begin_where_an_option_says(made):
    folder, pipeline, _ = made("lcm")
    options = [*rebuilt(folder, "lcm")[2], "guidance=3", "timestep=399"]
    generator = generators.build("turbo", folder, options)
    z = drawn(generator)
    latents = z.view(3, *generator.latent_shape)
    prompts = {"prompt": fixtures.PROMPTS, "latents": latents, "output_type": "pt"}
    expected = pipeline(**prompts, timesteps=[399], guidance_scale=3.0).images
    torch.testing.assert_close(generator(z, torch.arange(3)), 2 * expected - 1, rtol=1e-5, atol=2e-6)
    unlike = pipeline(**prompts, timesteps=[399], guidance_scale=8.5).images
    assert not torch.allclose(unlike, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["conditional", "published", *LATENT])
def test_gradients_are_those_of_finite_differences(made, kind):
    folder, _, generator = made(kind)
    generator = generators.build(*rebuilt(folder, kind)).double()
    z, random = drawn(generator, torch.float64).requires_grad_(), torch.Generator().manual_seed(1)
    toward = torch.randn(z.shape, generator=random, dtype=torch.float64)
    weights = torch.randn(3, *generator.image_shape, generator=random, dtype=torch.float64)

    def value(latents):
        return (generator(latents, LABELS) * weights).sum()

    (gradient,) = torch.autograd.grad(value(z), z)
    with torch.no_grad():
        change = (value(z + 1e-5 * toward) - value(z - 1e-5 * toward)) / 2e-5
    assert (gradient * toward).sum().item() == pytest.approx(change.item(), rel=1e-6)
    assert gradient.norm(dim=1).min() > 0


@pytest.mark.parametrize("kind", ["conditional", "large", "sdxs"])
def test_activations_can_be_computed_again_rather_than_kept(made, kind):
    name, folder, options = rebuilt(made(kind)[0], kind)
    gradients, kept = [], []
    for checkpoint in (False, True):
        config = GeneratorConfig(name, tuple(options), str(folder), checkpoint=checkpoint)
        generator = generators.load(config, torch.device("cpu")).double()
        z, sizes = drawn(generator, torch.float64).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.nbytes) or x, lambda x: x):
            loss = generator(z, LABELS).square().sum()
        gradients += torch.autograd.grad(loss, z)
        kept.append(sum(sizes))
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(("layout", "tolerance"), [({"max_shard_size": "4KB"}, 0), ({"variant": "fp16"}, 0.01)])
def test_weights_are_found_in_shards_and_in_half_precision(made, tmp_path, layout, tolerance):
    from diffusers import StableDiffusionPipeline

    folder, _, generator = made("turbo")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.to(torch.float16 if "variant" in layout else torch.float32).save_pretrained(tmp_path, **layout)
    files = {path.name for path in (tmp_path / "unet").glob("*.safetensors")}
    assert len(files) > 1 if "max_shard_size" in layout else all("fp16" in name for name in files)
    other = generators.build("turbo", tmp_path, rebuilt(folder, "turbo")[2])
    z = drawn(generator)
    torch.testing.assert_close(other(z, LABELS), generator(z, LABELS), rtol=0, atol=tolerance)


def as_pickles(folder):
    """Components' weights as the `.bin` files in which older models were published."""
    from safetensors.torch import load_file

    for path in folder.glob("*/*.safetensors"):
        name = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(load_file(path), path.with_name(f"{name}.bin"))
        path.unlink()


@pytest.mark.parametrize("kind", ["consistency", "turbo"])
def test_weights_are_found_in_bin_files(made, tmp_path, kind):
    folder, _, generator = made(kind)
    as_pickles(shutil.copytree(folder, tmp_path / kind))
    options = rebuilt(folder, kind)[2] if kind == "turbo" else []
    other = generators.build(kind, tmp_path / kind, options)
    assert generators.digest(other) == generators.digest(generator)


class Program:
    """What a pickle can do to who loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_programs_in_bin_files_are_not_run(made, tmp_path, component):
    folder = shutil.copytree(made("turbo")[0], tmp_path / "turbo")
    as_pickles(folder)
    (path,) = (folder / component).glob("*.bin")
    torch.save({"weight": Program(tmp_path / "run")}, path)
    with pytest.raises(UsageError, match=f"{component} holds no ") as caught:
        generators.build("turbo", folder, rebuilt(made("turbo")[0], "turbo")[2])
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def rebuilt(folder, kind):
    if kind in ("conditional", "published"):
        return "consistency", folder, []
    return "turbo", folder, [f"prompts={folder.parent / 'prompts.txt'}"]


def test_prompts_are_embedded_once_and_text_encoders_freed(made, monkeypatch):
    folder, _, generator = made("turbo")
    name, folder, options = rebuilt(folder, "turbo")
    again = generators.build(name, folder, options)
    monkeypatch.setattr(type(made("turbo")[1]), "encode_prompt", lambda *_, **__: pytest.fail("embedded again"))
    assert generators.digest(generators.build(name, folder, options)) == generators.digest(again)
    assert not any("text" in key or "encoder." in key for key in again.state_dict())
    assert generators.build(name, folder, options).classes == generator.classes == 3


def test_what_decides_images_is_in_the_record(made, tmp_path):
    folder = shutil.copytree(made("turbo")[0], tmp_path / "model")

    def record(*options):
        config = GeneratorConfig("turbo", (f"prompts={fixtures.prompts_file(tmp_path)}", *options), str(folder))
        return generators.load(config, torch.device("cpu")).record

    first = record()
    (folder / "README.md").write_text("of no component")
    assert record() == first and first["weights"] == str(folder) and first["prior"] == "normal"
    assert record("classes=2")["digest"] != first["digest"] and record("classes=2")["sha256"] == first["sha256"]
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    changed = record()
    assert changed["sha256"] != first["sha256"] and changed["digest"] != first["digest"]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_onnx(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "model.onnx")


def pointer(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def cut(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_weight(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path, {"format": "pt"})


def in_place_of_all(folder, name):
    """A folder of one file alone."""
    shutil.rmtree(folder)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json is missing: generator turbo needs"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json is not valid JSON"),
        (
            lambda folder: edit(folder / "model_index.json", _class_name="FluxPipeline"),
            "model_index.json is of a FluxPipeline: generator turbo takes StableDiffusionPipeline or",
        ),
        (
            lambda folder: in_place_of_all(folder, "pytorch_lora_weights.safetensors"),
            r"needs a folder .*; pytorch_lora_weights.safetensors is a LoRA: .* call fuse_lora\(\), and save",
        ),
        (
            lambda folder: in_place_of_all(folder, "dmd2_sdxl_1step_unet_fp16.bin"),
            "load dmd2_sdxl_1step_unet_fp16.bin in diffusers .* its base model's unet",
        ),
        (lambda folder: in_place_of_all(folder, "snapshots/0/model_index.json"), "and one lies in .*snapshots"),
        *(
            (lambda folder, name=name: shutil.rmtree(folder / name), f"turbo has no folder {name}, which a Stable")
            for name in ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
        ),
        (only_onnx, "unet has no weights of PyTorch .* but config.json, model.onnx: get it whole"),
        (pointer, "diffusion_pytorch_model.safetensors is a pointer of Git LFS, not the weights: run `git lfs pull`"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), "unet holds no UNet2DConditionModel"),
        (cut, "vae holds no AutoencoderKL"),
        (without_weight, "text_encoder does not hold a CLIPTextModel: 1 weights missing"),
        (
            lambda folder: edit(folder / "scheduler" / "scheduler_config.json", _class_name="os"),
            "scheduler names 'os', which is no scheduler of diffusers",
        ),
        (
            lambda folder: edit(
                folder / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler", thresholding=True
            ),
            "scheduler: DDPMScheduler can't make one step of this model .*it clips, or draws noise",
        ),
        (lambda folder: edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4), "config.json has latents_mean"),
        (
            lambda folder: edit(folder / "vae" / "config.json", _class_name="ConsistencyDecoderVAE"),
            "vae/config.json is of a ConsistencyDecoderVAE: generator turbo takes AutoencoderKL or AutoencoderTiny",
        ),
    ],
)
def test_folders_that_cannot_be_are_named(made, tmp_path, fault, words):
    folder = shutil.copytree(made("turbo")[0], tmp_path / "turbo")
    fault(folder)
    with pytest.raises(UsageError, match=words) as caught:
        generators.build("turbo", folder, [f"prompts={fixtures.prompts_file(tmp_path)}"])
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_cannot_begin_at_a_timestep_is_named(made, tmp_path):
    folder = shutil.copytree(made("turbo")[0], tmp_path / "turbo")
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    options = [f"prompts={fixtures.prompts_file(tmp_path)}", "timestep=399"]
    with pytest.raises(UsageError, match="DDIMScheduler can't make one step of this model .*given timestep"):
        generators.build("turbo", folder, options)


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (None, [], "generator turbo needs prompts: give --generator.options prompts=FILE"),
        ([], [], "prompts.txt has 0 lines"),
        (fixtures.PROMPTS, ["classes=4"], "prompts.txt has 3 lines, and classes are 4"),
        (["a cat", "  ", "a dog"], [], "prompts.txt: line 2 is empty"),
    ],
)
def test_prompts_that_cannot_be_are_named(made, tmp_path, lines, options, words):
    if lines is not None:
        path = tmp_path / "prompts.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        options = [*options, f"prompts={path}"]
    with pytest.raises(UsageError, match=words):
        generators.build("turbo", made("turbo")[0], options)


def test_a_consistency_model_draws_colours(tmp_path):
    fixtures.consistency(tmp_path, channels=1)
    with pytest.raises(UsageError, match="unet: expected 3 channels, as ConsistencyModelPipeline does, got 1"):
        generators.build("consistency", tmp_path)


def test_a_missing_package_is_named(made, monkeypatch):
    folder = made("consistency")[0]  # which needs the package
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"needs the package diffusers: pip install 'copgen_fast\[diffusers\]'"):
        generators.build("consistency", folder)


@pytest.mark.parametrize("name", ["consistency", "turbo"])
def test_a_folder_must_be_given(tmp_path, name):
    with pytest.raises(UsageError, match="give --generator.weights FOLDER"):
        generators.build(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is no folder"):
        generators.build(name, tmp_path / "file")


def test_a_run_with_a_convolutional_navigator_ends_with_an_encoder(made, tmp_path):
    name, folder, options = rebuilt(made("turbo")[0], "turbo")
    arguments = ["--generator.name", name, "--generator.weights", str(folder), "--generator.options", *options]
    arguments += ["--navigator.kind", "conv", "--navigator.hidden", "5", "--pairs.positives", "navigator"]
    arguments += ["--stages", "navigator", "pairs", "pretrain", "--navigator.samples", "32", "--pretrain.epochs", "1"]
    assert main([*TINY, *arguments, "--pairs.samples-per-class", "8", "--out", str(tmp_path)]) == 0
    walker = artifacts.read_tensors(tmp_path / "navigator" / "navigator.safetensors")
    assert walker["walker.1.weight"].shape == (5, 4, 3, 3)
    index = read_complete_index(tmp_path / "pairs" / "navigator")
    assert index.latent_dim == 64 and index.identity["prior"] == "normal" and index.identity["classes"] == 3
    assert list(tmp_path.glob("pretrain/navigator/*/encoder.safetensors"))
