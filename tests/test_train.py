"""The training loop, its checkpoint and its bar: what it reaches and returns, and that what it survives changes nothing."""

import math
import threading

import pytest
import torch
from torch import nn

from finediff import provenance
from finediff.diffusion.exact import GaussianScore
from finediff.diffusion.objective import DenoisingScoreMatching, FlowMatching, Times
from finediff.diffusion.process import VP, Linear, linear_betas, quadratic_betas
from finediff.diffusion.score import NetworkScore
from finediff.diffusion.train import train
from finediff.generators import training
from finediff.generators.training import Checkpoint, progress_bar
from finediff.networks.mlp import MLP

OBJECTIVE = DenoisingScoreMatching("eps", antithetic=True)


def seeded(seed, device="cpu"):
    return torch.Generator(device=device).manual_seed(seed)


def small_model(seed=0, process=None, width=16, n_conditions=0, device="cpu"):
    network = MLP(2, width, 1, n_conditions=n_conditions, generator=torch.Generator().manual_seed(seed))
    return NetworkScore(network, process or VP()).to(device)


def rows(n, seed=0, device="cpu"):
    """Correlated normal rows."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    root = torch.linalg.cholesky(COVARIANCE)
    return (MEAN + z @ root.T).to(device)


MEAN = torch.tensor([0.8, -0.6])
COVARIANCE = torch.tensor([[2.25, 0.45], [0.45, 0.25]])  # standard deviations 1.5 and .5, correlation .6


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def short(model, *, seed=7, x=None, **changes):
    """A training of 60 steps and 6 evaluations, each setting open to change."""
    device = model.device
    settings = {
        "steps": 60,
        "batch": 16,
        "evaluate_every": 10,
        "held_out": rows(30, 2, device),
        "learning_rate": 5e-3,
    } | changes
    if "checkpoint" in settings:
        settings["checkpoint"] = Checkpoint(settings["checkpoint"])
    x = rows(64, 1, device) if x is None else x
    return train(model, x, settings.pop("objective", OBJECTIVE), generator=seeded(seed, device), **settings)


# ------------------------------------------------------------------ what it reaches


@pytest.mark.parametrize(
    ("process", "objective"),
    [(VP(), OBJECTIVE), (Linear(), FlowMatching(antithetic=True))],
    ids=["DDPM", "flow matching"],
)
def test_training_comes_close_to_the_exact_loss_of_a_normal_law(process, objective, device):
    """Excess over the exact model, on the same fresh rows, times and noise; 2-4 % of the untrained one is left."""
    model = small_model(process=process, width=32, device=device)
    exact = GaussianScore(MEAN, COVARIANCE, process).to(device)
    fresh = rows(20_000, 5, device)

    def excess():
        with torch.no_grad():
            found, best = (objective.losses(m, fresh, generator=seeded(6, device)) for m in (model, exact))
        difference = found - best
        return float(difference.mean()), float(difference.std()) / len(difference) ** 0.5

    before, _ = excess()
    train(
        model,
        rows(20_000, 3, device),
        objective,
        steps=400,
        batch=128,
        learning_rate=4e-3,
        generator=seeded(0, device),
    )
    after, error = excess()
    assert before > 0.05
    assert after < 0.08 * before
    assert after > -4 * error  # nothing beats the exact model


# ------------------------------------------------------------------ what it returns


def test_average_of_the_weights_is_what_is_returned(device):
    """The weights after each step, averaged by hand."""
    model, seen = small_model(device=device), []
    start = state(model)
    short(
        model,
        held_out=None,
        evaluate_every=1,
        ema_decay=0.9,
        callbacks=[lambda told: seen.append(state(told.model))],
    )
    assert len(seen) == 60
    average = start
    for n, values in enumerate(seen, start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * values[name] for name in values}
    assert not same_bits(state(model), seen[-1])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6)


def test_early_stop_returns_the_weights_of_the_least_held_out_loss(device):
    few, held_out = rows(10, 1, device), rows(200, 2, device)
    averages = {}
    model = small_model(width=32, device=device)
    history = train(
        model,
        few,
        OBJECTIVE,
        steps=2000,
        batch=10,
        learning_rate=2e-2,
        ema_decay=0.9,
        held_out=held_out,
        evaluate_every=20,
        patience=4,
        callbacks=[
            lambda told: averages.update({told.step: {k: v.clone() for k, v in told.average.items()}})
        ],
        generator=seeded(4, device),
    )
    assert history.stopped == "early"
    assert history.best_step < history.step[-1] < 2000
    assert history.step[-1] == history.best_step + 4 * 20
    assert min(history.held_out_loss) == history.held_out_loss[history.step.index(history.best_step)]
    assert same_bits(state(model), averages[history.best_step])

    # The recorded minimum, from the printed recipe: a seed drawn first, four copies of the rows, shuffled.
    first = seeded(4, device)
    noise = seeded(int(torch.randint(2**31, (), generator=first, device=device)), device)
    copies = held_out.repeat(4, 1)
    order = torch.randperm(len(copies), generator=noise, device=device)
    with torch.no_grad():
        assert float(OBJECTIVE(model, copies[order], None, noise)) == min(history.held_out_loss)


def test_whole_budget_is_used_without_held_out_rows():
    model = small_model()
    history = short(model, held_out=None, patience=1)
    assert history.stopped == "budget"
    assert history.step == [10, 20, 30, 40, 50, 60]
    assert history.held_out_loss == []
    assert history.best_step == 60


def test_train_loss_is_the_mean_of_its_batches():
    """Recorded at each step by the objective itself; the last, shorter stretch is evaluated too."""
    losses = []

    def recording(model, x, condition, generator):
        loss = OBJECTIVE(model, x, condition, generator)
        losses.append(loss.item())
        return loss

    history = short(small_model(), objective=recording, held_out=None, steps=25)
    assert history.step == [10, 20, 25]
    expected = [sum(losses[a:b]) / (b - a) for a, b in ((0, 10), (10, 20), (20, 25))]
    assert history.train_loss == pytest.approx(expected, rel=1e-5)


def test_conditions_go_with_their_rows():
    """The objective is given x[rows] beside condition[rows], in training and held out."""

    def checking(model, x, condition, generator):
        assert torch.equal(condition, x[:, :1])
        return OBJECTIVE(model, x, condition, generator)

    x, held_out = rows(64, 1), rows(30, 2)
    model = small_model(n_conditions=1)
    short(model, objective=checking, x=x, condition=x[:, :1], held_out_condition=held_out[:, :1])


# ------------------------------------------------------------------ the same bits


def test_same_seed_same_bits_and_another_seed_others(device):
    models = [small_model(device=device) for _ in range(3)]
    histories = [short(model, seed=seed) for model, seed in zip(models, (7, 7, 8))]
    assert same_bits(state(models[0]), state(models[1]))
    assert histories[0] == histories[1]
    assert not same_bits(state(models[0]), state(models[2]))


def test_looking_does_not_change_the_training():
    """Evaluations, callbacks and a progress bar leave every update as it was."""
    ends = []
    for settings in (
        {"evaluate_every": 60, "held_out": None},
        {"evaluate_every": 7, "patience": None},
        {"evaluate_every": 60, "progress": progress_bar(wanted=True)},
    ):
        model, last = small_model(), {}
        short(model, **settings, callbacks=[lambda told, last=last: last.update(state(told.model))])
        ends.append(last)
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"held_out": None},
        {"objective": FlowMatching(times=Times("uniform", stratified=False))},
    ],
    ids=["held out", "no held out", "independent times"],
)
@pytest.mark.parametrize("evaluations", [1, 3])
def test_interrupted_training_goes_on_to_the_same_weights(settings, evaluations, tmp_path, device):
    whole = small_model(device=device)
    expected = short(whole, **settings)

    file, told = tmp_path / "new" / "training.safetensors", []

    def interrupt(evaluation):
        told.append(evaluation.step)
        if len(told) == evaluations:
            raise KeyboardInterrupt

    first = small_model(device=device)
    with pytest.raises(KeyboardInterrupt):
        short(first, **settings, callbacks=[interrupt], checkpoint=file)
    assert file.exists() == (evaluations > 1)

    steps = []
    second = small_model(seed=99, device=device) if evaluations > 1 else small_model(device=device)
    history = short(second, **settings, checkpoint=file, callbacks=[lambda told: steps.append(told.step)])
    assert same_bits(state(second), state(whole))
    assert history == expected
    assert steps[0] == 10 * evaluations  # the interrupted stretch is done again, the earlier ones are not

    # A finished training is not gone on with, and gives the same once more.
    third, steps = small_model(seed=98, device=device), []
    assert (
        short(third, **settings, checkpoint=file, callbacks=[lambda told: steps.append(told.step)])
        == expected
    )
    assert steps == []
    assert same_bits(state(third), state(whole))


def test_patience_survives_an_interruption(tmp_path):
    """Cut at the evaluation that would have stopped it, the training stops there, with the best weights of before."""
    settings = {"x": rows(8, 1), "steps": 400, "learning_rate": 2e-2, "ema_decay": 0.9, "patience": 3}
    whole, file = small_model(width=32), tmp_path / "training.safetensors"
    expected = short(whole, **settings)
    assert expected.stopped == "early"
    last = expected.step[-1]
    assert 10 < expected.best_step == last - 30

    def interrupt(told):
        if told.step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short(small_model(width=32), **settings, checkpoint=file, callbacks=[interrupt])
    again = small_model(seed=99, width=32)
    assert short(again, **settings, checkpoint=file) == expected
    assert same_bits(state(again), state(whole))


# ------------------------------------------------------------------ what it refuses


def test_checkpoint_of_another_training_is_refused(tmp_path):
    file = tmp_path / "training.safetensors"
    discrete = VP.from_betas(linear_betas(10))
    short(small_model(process=discrete), checkpoint=file, callbacks=[lambda told: told.step == 20])
    before = file.read_bytes()
    other_rows = rows(64, 1)
    other_rows[3, 0] += 1e-3
    for named, changes in {
        "seed": {"seed": 8},
        "data": {"x": other_rows},
        "held-out data": {"held_out": rows(30, 3)},
        "conditions": {"condition": torch.zeros(64, 1)},
        "steps": {"steps": 50},
        "batch": {"batch": 8},
        "learning_rate": {"learning_rate": 1e-3},
        "weight_decay": {"weight_decay": 0.0},
        "ema_decay": {"ema_decay": 0.5},
        "evaluate_every": {"evaluate_every": 20},
        "patience": {"patience": 3},
        "objective": {"objective": DenoisingScoreMatching("v", antithetic=True)},
        "times": {"objective": DenoisingScoreMatching("eps", Times("uniform"), antithetic=True)},
    }.items():
        with pytest.raises(ValueError, match="checkpoint of this training"):
            short(small_model(process=discrete), checkpoint=file, **changes)
        assert file.read_bytes() == before, named
    for model in (
        small_model(process=VP()),
        small_model(process=VP.from_betas(quadratic_betas(10))),
        small_model(process=discrete, width=8),
    ):
        with pytest.raises(ValueError, match="checkpoint of this training"):
            short(model, checkpoint=file)


def test_losses_that_are_not_finite_are_refused(tmp_path):
    x, file = rows(64, 1), tmp_path / "training.safetensors"
    x[5, 1] = math.inf
    with pytest.raises(ValueError, match="finite loss"):
        short(small_model(), x=x, checkpoint=file)
    assert not file.exists()
    held_out = rows(30, 2)
    held_out[4, 0] = math.nan
    with pytest.raises(ValueError, match="finite held-out loss"):
        short(small_model(), held_out=held_out, checkpoint=file)
    assert not file.exists()


@pytest.mark.parametrize("moment", ["half a file", "before it is put in place"])
def test_killed_while_writing_leaves_the_last_whole_checkpoint(moment, tmp_path, monkeypatch):
    whole = small_model()
    expected = short(whole)
    file, written = tmp_path / "training.safetensors", []
    real_save, real_replace = training.save_file, provenance.os.replace

    def save(tensors, path, metadata):
        real_save(tensors, path, metadata=metadata)
        if moment == "half a file" and len(written) == 2:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise KeyboardInterrupt

    def replace(source, target):
        if moment != "half a file" and len(written) == 2:
            raise KeyboardInterrupt
        real_replace(source, target)
        written.append(file.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_file", save)
        patch.setattr(provenance.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            short(small_model(), checkpoint=file)
    assert file.read_bytes() == written[1]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    again = small_model(seed=99)
    assert short(again, checkpoint=file) == expected
    assert same_bits(state(again), state(whole))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_lonely_partial_file_is_not_read(tmp_path):
    file = tmp_path / "training.safetensors"
    file.with_name(file.name + ".partial").write_bytes(b"not a checkpoint")
    whole, model = small_model(), small_model()
    assert short(whole) == short(model, checkpoint=file)
    assert same_bits(state(whole), state(model))


# ------------------------------------------------------------------ callbacks and progress


def test_callbacks_are_told_everything_and_can_stop(device):
    told = []

    def stop(evaluation):
        told.append(evaluation)
        return evaluation.step == 30

    always = []
    history = short(
        small_model(device=device), callbacks=[stop, lambda evaluation: always.append(evaluation.step)]
    )
    assert history.stopped == "early"
    assert history.step == always == [10, 20, 30]
    assert [(e.step, e.steps, e.train_loss, e.held_out_loss) for e in told] == [
        (step, 60, train_loss, held_out)
        for step, train_loss, held_out in zip(history.step, history.train_loss, history.held_out_loss)
    ]


def test_progress_is_written_to_standard_error_only_where_asked(capsys):
    quiet, loud = small_model(), small_model()
    short(quiet, progress=progress_bar("fitting the tests", False))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    short(loud, progress=progress_bar("fitting the tests", True))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fitting the tests" in captured.err
    assert same_bits(state(quiet), state(loud))


def test_no_bar_goes_on_drawing_after_an_error():
    """The traceback, which a notebook keeps, holds the loop's frame: its bar must be closed all the same."""

    def interrupt(told):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        short(small_model(), progress=progress_bar(wanted=True), callbacks=[interrupt])
    assert kept.value.__traceback__ is not None
    drawing = [thread for thread in threading.enumerate() if "Refresh" in type(thread).__name__]
    for thread in drawing:
        thread.join(10)  # told to stop, it may be in the middle of a line
    assert not any(thread.is_alive() for thread in drawing)


# ------------------------------------------------------------------ the schedule


def test_learning_rate_is_warmed_up_then_lowered_by_a_cosine(monkeypatch):
    """Updates of plain gradient descent on a constant slope are the rates themselves."""

    class Slope(nn.Module):
        process, device = VP(), torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros((), dtype=torch.float64))

    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, **_: torch.optim.SGD(weights, lr=1.0))
    model, seen, steps = Slope(), [0.0], 500
    train(
        model,
        torch.zeros(4, 1),
        lambda model, *_: -model.value / 2,
        steps=steps,
        learning_rate=0.02,
        evaluate_every=1,
        callbacks=[lambda told: seen.append(float(told.model.value.detach()))],
        generator=seeded(0),
    )
    rates = 2 * torch.tensor(seen, dtype=torch.float64).diff()
    k = torch.arange(steps, dtype=torch.float64)
    expected = 0.02 * ((k + 1) / 200).clamp(max=1) * (1 + torch.cos(torch.pi * k / steps)) / 2
    torch.testing.assert_close(rates, expected, rtol=1e-9, atol=1e-12)
