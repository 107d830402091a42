"""LoRA and QLoRA against peft's own forward, merged weights, the plain model, and a training that is cut in two."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SMALL, Command, timeless
from test_decode import Kept, assert_same, rolled

from grpo_cli.core.model import lora
from grpo_cli.core.model.packed import PackedPath, can_step_in_place
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rollout.engine import uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.selfcheck import load_checked
from grpo_cli.core.run.folder import Run

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

SEQUENCES = Sequences([[5, 17, 300], [8, 9]], [[400, 9, 33], [7, 12], [6]], [0, 0, 1])
TRAIN = ["train", "--run", "first", *SMALL, "--lora-rank", "4", "--learning-rate", "0.01"]


def adapted(folder: Path, **settings: object) -> Policy:
    """The model of a folder with an adapter that passed the self-check."""
    adapter = lora.Lora(rank=4, alpha=8.0, **settings)  # type: ignore[arg-type]
    return load_checked(str(folder), name=str(folder), device="cpu", precision="float32", adapter=adapter)


def logprobs(policy: Policy) -> torch.Tensor:
    return policy.logprobs(SEQUENCES, temperature=0.8)[0].detach()


@pytest.mark.parametrize("nf4", [False, True])
def test_adapter_separate_and_merged_weights_and_peft_itself_agree(
    nf4: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    policy = adapted(tiny_folder, nf4=nf4)
    base = logprobs(policy)
    with lora.perturbed(policy.model):
        separate = logprobs(policy)
        policy.save(tmp_path / "merged")
        lora.save_adapter(policy.model, tmp_path / "adapter")
        rollout = LocalEngine(policy).sample(
            [[5, 17, 300], [8, 9]],
            SamplingParams(5, 0.8, 2),
            uniform=uniforms(0, 0, [0, 1], 2, 5),
        )
        drawn = Sequences([[5, 17, 300], [8, 9]], rollout.completions, [0, 0, 1, 1])
        again = policy.logprobs(drawn, temperature=0.8)[0][drawn.mask()]
        with Reference.of(policy).on_device():
            assert torch.equal(logprobs(policy), base)
    assert (separate - base).abs().max() > 0.1
    sampled = torch.tensor([value for row in rollout.logprobs for value in row])
    assert torch.allclose(sampled, again, atol=1e-4)  # sampled through merged weights, unless they are in 4 bits
    merged = load_checked(str(tmp_path / "merged"), name="merged", device="cpu", precision="float32")
    assert torch.allclose(logprobs(merged), separate, atol=1e-4)
    if not nf4:
        plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
        oracle = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        row = torch.tensor([[5, 17, 300, 400, 9, 33]])
        expected = (oracle(row).logits[0, 2:5] / 0.8).log_softmax(-1).gather(1, row[0, 3:, None])[:, 0]
        assert torch.allclose(separate[0], expected.detach(), atol=1e-4)


def test_merged_weights_are_not_rounded_to_16_bits(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, dtypes = lora.Lora(rank=4, alpha=8.0), list[torch.dtype]()
    wide = load_checked(str(tiny_folder), name="tiny", device="cpu", precision="bf16-master", adapter=adapter)
    monkeypatch.setattr("grpo_cli.core.model.packed.WIDE", 1)
    monkeypatch.setattr("grpo_cli.core.model.llama.Pass", lambda _, **given: dtypes.append(given["dtype"]))
    PackedPath().step(wide, 8)
    assert dtypes == [torch.float32]


def test_only_the_adapter_learns_with_and_without_checkpointing(tiny_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        adapter = lora.Lora(rank=4, alpha=8.0)
        policy = load_checked(
            str(tiny_folder),
            name="tiny",
            device="cpu",
            precision="float32",
            gradient_checkpointing=checkpointing,
            adapter=adapter,
        )
        policy.logprobs(SEQUENCES, temperature=1.0)[0].sum().backward()
        assert sum(weight.numel() for weight in policy.trainable) == 3712
        assert {".lora_" in name for name, w in policy.model.named_parameters() if w.grad is not None} == {True}
        gradients.append(torch.cat([w.grad.flatten() for w in policy.trainable if w.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_resumed_adapter_goes_on_as_if_never_stopped(
    quantize: str, countdown: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    """The reference is the base model throughout: the KL is 0 at first and grows, also after the resume."""
    (tmp_path / "own.py").write_text("def length(completion, puzzle):\n    return len(completion) % 7")
    arguments = [*TRAIN, "--model", tiny_folder, "--quantize", quantize, "--num-iterations", "3"]
    arguments += ["--reward", "own.py:length"]
    assert countdown(*arguments).code == 0
    run = Run(tmp_path / "runs" / "first")
    whole = timeless(run)
    assert whole[1]["kl"] == pytest.approx(0, abs=1e-6) and whole[3]["kl"] > 1e-6
    assert countdown("train", "--run", "first", "--resume", "--step", "2").code == 0
    assert timeless(run) == whole
    saved = tmp_path / "runs/first/checkpoints/step-3/model"
    assert {path.name for path in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_export_writes_the_adapter_or_the_merged_model(countdown: Command, tiny_folder: Path, tmp_path: Path) -> None:
    assert countdown(*TRAIN, "--model", tiny_folder).code == 0
    assert countdown("export", "first", "adapter").code == 0
    assert countdown("export", "first", "whole", "--merge").code == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    both = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    row = torch.tensor([[5, 17, 300, 400]])
    assert torch.allclose(both(row).logits, whole(row).logits, atol=1e-4)
    card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    assert "library_name: peft" in card and "PeftModel" in card
    answers = []
    for name in ("adapter", "whole"):
        code = (tmp_path / name / "README.md").read_text("utf-8").partition("```python\n")[2].partition("```")[0]
        with redirect_stdout(StringIO()) as printed:
            exec(code.replace("path/to/this/folder", str(tmp_path / name)).replace("=360", "=12"), {})
        answers.append(printed.getvalue())
    assert answers[0] == answers[1] != ""
    assert countdown("eval", "first", "--limit", "2", "--max-new-tokens", 8).code == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--quantize", "nf4"], "`--quantize` has no effect without `--lora-rank`"),
        (["--lora-rank", "4", "--warm-start", "8"], "that run's `warm_start` folder"),
        (["--lora-rank", "4", "--shard"], "`--shard`"),
        (["--lora-rank", "4", "--lora-targets", "q_proj, qq"], "is called `qq`"),
    ],
)
def test_what_an_adapter_rules_out_is_one_sentence(
    arguments: list[str], sentence: str, countdown: Command, tiny_folder: Path
) -> None:
    result = countdown("train", "--model", tiny_folder, *arguments)
    assert result.code == 2
    assert sentence in result.err and "Traceback" not in result.err


def test_the_plan_counts_an_adapter_instead_of_gradients_moments_and_a_reference(
    countdown: Command, tiny_folder: Path
) -> None:
    rows = {}
    for rank in ("0", "4"):
        shown = countdown("train", "--model", tiny_folder, "--dry-run", "-v", "--lora-rank", rank).out
        rows[rank] = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert "reference" in rows["0"] and "adapter" not in rows["0"]
    assert "adapter" in rows["4"] and "reference" not in rows["4"]


def test_a_static_step_reads_the_adapter_in_place(tiny_folder: Path) -> None:
    policy = adapted(tiny_folder, targets=("q_proj", "o_proj", "up_proj", "down_proj"))
    kept = Kept()
    prompts = [[5, 17, 300], [8, 9]]
    drawn = []
    for scale in (1.0, 2.0):  # the same sampler, after the adapter has changed
        with lora.perturbed(policy.model), torch.no_grad():
            for layer in lora.adapted(policy.model).values():
                layer.lora_B[lora.ADAPTER].weight.mul_(scale)
            drawn.append(rolled(policy, prompts, static=True, kept=kept))
            assert_same(drawn[-1], rolled(policy, prompts, static=False))
    assert len(kept) == 1 and drawn[0].completions != drawn[1].completions
    assert can_step_in_place(policy) and not can_step_in_place(adapted(tiny_folder, nf4=True))
