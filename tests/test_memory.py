"""The dial's two ends, the two times, when the monitor stops a training, and that it does not touch it."""

import copy

import numpy as np
import pytest
import torch

from finediff.diffusion.exact import EmpiricalScore, GaussianScore
from finediff.diffusion.memory import MemorisationMonitor, copied_share
from finediff.diffusion.objective import DenoisingScoreMatching, FlowMatching
from finediff.diffusion.process import VP, Linear
from finediff.diffusion.sample import ProbabilityFlow
from finediff.diffusion.score import NetworkScore
from finediff.diffusion.train import Evaluation, train
from finediff.memorisation import memorised_fraction
from finediff.networks.mlp import MLP

OBJECTIVE = DenoisingScoreMatching("eps", antithetic=True)
COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 1.5, 0.2], [0.0, 0.2, 0.5]])


def seeded(seed, device="cpu"):
    return torch.Generator(device=device).manual_seed(seed)


def law(process=None, device="cpu", shift=0.0):
    return GaussianScore(np.full(3, shift), COVARIANCE, process or VP()).to(device)


def look(monitor, model, step=1):
    """What `train` tells a callback."""
    return monitor(Evaluation(step, 1000, 0.0, None, model, copy.deepcopy(model.state_dict())))


# ------------------------------------------------------------------ copies


def test_copies_are_counted_as_copies_and_fresh_rows_are_not(dtype, device, generator):
    rows = 3 + torch.randn(300, 12, dtype=dtype, device=device, generator=generator)
    fresh = 3 + torch.randn(200, 12, dtype=dtype, device=device, generator=generator)
    assert copied_share(rows[:70], rows) == 1
    assert copied_share(rows + 1e-3, rows) == 1
    assert copied_share(fresh, rows) == 0
    assert copied_share(torch.cat([fresh, rows[:50]]), rows) == pytest.approx(50 / 250)
    # A row that the panel holds twice has no second neighbour farther away; its copy is a copy.
    assert copied_share(rows[:70], torch.cat([rows, rows])) == 1
    for few, many in ((fresh[:0], rows), (fresh, rows[:1])):
        with pytest.raises(ValueError, match="at least 2 rows"):
            copied_share(few, many)


def test_copied_share_by_hand(generator, device):
    """Two loops, and the fraction of `finediff.memorisation` in the units of the data."""
    rows = torch.randn(60, 2, dtype=torch.float64, device=device, generator=generator)
    draws = torch.randn(80, 2, dtype=torch.float64, device=device, generator=generator)
    for ratio in (0.1, 1 / 3, 0.8):
        count = 0
        for draw in draws.tolist():
            d1, d2 = sorted(float(np.hypot(draw[0] - a, draw[1] - b)) for a, b in rows.tolist())[:2]
            count += d1 < ratio * d2
        share = copied_share(draws, rows, ratio)
        assert share == count / 80
        assert share == memorised_fraction(draws.cpu(), rows.cpu(), ratio, standardize=False)


@pytest.mark.parametrize("d", [1, 2, 6])
def test_of_fresh_rows_a_share_of_r_to_the_d_is_near_one_row(d, device, generator):
    """Locally the rows are a Poisson process: P(d_1 < r d_2) = P(one uniform point of a ball in r^d of it) = r^d."""
    rows, draws = torch.rand(2, 4000, d, dtype=torch.float64, device=device, generator=generator)
    for r in (1 / 3, 2 / 3):
        expected = r**d
        error = (expected * (1 - expected) / 4000) ** 0.5
        assert abs(copied_share(draws, rows, r) - expected) < 4 * error + (0.02 if d == 6 else 0)


# ------------------------------------------------------------------ the dial


@pytest.mark.parametrize("objective", [OBJECTIVE, FlowMatching()], ids=["eps", "flow"])
@pytest.mark.parametrize("process", [VP(), Linear()], ids=["VP", "Linear"])
def test_the_dial_is_1_for_the_rows_own_score_and_0_for_the_law(objective, process, device):
    """Over fresh panels the law's dial has mean 0: neither its training nor its held-out rows are known to it."""
    exact, dials, shares = law(process, device), [], []
    for seed in range(24):
        generator = seeded(seed, device)
        rows, held_out = exact.sample(150, generator), exact.sample(600, generator)
        monitor = MemorisationMonitor(
            rows, held_out, objective, n_draws=50, stop=None, sampler=ProbabilityFlow(6), seed=900 + seed
        )
        look(monitor, EmpiricalScore(rows, process), 1)
        look(monitor, exact, 2)
        assert monitor.dial[0] == 1
        dials.append(monitor.dial[1])
        shares.append(monitor.memorised)
        assert monitor.held_out_loss[0] > monitor.held_out_loss[1]
    dials, shares = np.array(dials), np.array(shares).mean(0)
    error = dials.std(ddof=1) / len(dials) ** 0.5
    assert error < 0.1
    assert abs(dials.mean()) < 4 * error
    assert shares[0] > 0.95
    assert shares[1] < 3**-3 + 4 * (3**-3 / 1200) ** 0.5


def test_the_dial_reads_how_much_of_a_model_is_the_rows_own_score(device):
    """It grows along the way from the law to the rows, in x0_hat."""

    class Between(EmpiricalScore):
        def __init__(self, share, rows, exact):
            super().__init__(rows, exact.process)
            self.share, self.exact = share, exact

        def denoise(self, x, t, condition=None):
            return self.share * super().denoise(x, t) + (1 - self.share) * self.exact.denoise(x, t)

    exact = law(device=device)
    rows, held_out = exact.sample(60, seeded(0, device)), exact.sample(500, seeded(1, device))
    monitor = MemorisationMonitor(rows, held_out, OBJECTIVE, n_draws=2, stop=None, sampler=ProbabilityFlow(2))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        look(monitor, Between(share, rows, exact))
    assert (np.diff(monitor.dial) > 0).all()
    assert monitor.dial[-1] == 1


def test_losses_are_those_of_the_average_on_the_same_noise(device):
    """Naive twin: four copies of the rows in the monitor's order; the model's own weights are not what is judged."""
    exact, off = law(device=device), law(device=device, shift=2.0)
    rows, held_out = exact.sample(40, seeded(0, device)), exact.sample(30, seeded(1, device))
    monitor = MemorisationMonitor(rows, held_out, OBJECTIVE, n_draws=20, seed=5, stop=None)
    monitor(Evaluation(7, 10, 0.0, None, off, exact.state_dict()))
    for found, x in ((monitor.train_loss, rows), (monitor.held_out_loss, held_out)):
        generator = seeded(5, device)
        order = torch.randperm(4 * len(x), generator=generator, device=device)
        expected = OBJECTIVE(exact, torch.cat([x] * 4)[order], None, generator)
        assert found == [float(expected)]
    draws = ProbabilityFlow(24)(exact, (20, 3), generator=seeded(5, device))
    assert monitor.memorised == [copied_share(draws, rows)]
    assert monitor.step == [7]
    assert float(off.mean[0]) == 2


# ------------------------------------------------------------------ the two times


def scripted(held_out_loss, memorised, **settings):
    rows = law().sample(40, seeded(0))
    monitor = MemorisationMonitor(rows, law().sample(400, seeded(1)), OBJECTIVE, **settings)
    monitor.step = [100 * (i + 1) for i in range(len(held_out_loss))]
    monitor.held_out_loss, monitor.memorised = held_out_loss, memorised
    return monitor


def test_tau_gen_is_the_step_of_the_least_held_out_loss():
    assert scripted([], []).tau_gen is None
    assert scripted([3.0], [0.0]).tau_gen == 100
    assert scripted([3.0, 2.0, 1.0, 1.5, 1.0], [0.0] * 5).tau_gen == 300  # the first of equals


def test_tau_mem_is_the_first_step_with_copies_above_the_floor():
    """The floor is what held-out rows show by chance: 1/27 in three dimensions."""
    monitor = scripted([1.0] * 4, [0.0] * 4)
    floor = monitor.floor
    assert floor == copied_share(monitor.held_out, monitor.train)
    assert abs(floor - 1 / 27) < 4 * (1 / 27 / 400) ** 0.5
    assert scripted([], []).tau_mem is None
    assert monitor.tau_mem is None
    assert scripted([1.0] * 4, [floor, floor + 0.049, floor + 0.051, 0.0]).tau_mem == 300
    assert scripted([1.0] * 4, [floor, floor + 0.049, floor + 0.051, 0.9], onset=0.2).tau_mem == 400


def test_two_assets_without_memorisation_show_no_onset():
    """One fresh draw in nine has a ratio below 1/3 there: more than 5 %, and none of it is memory."""
    exact = GaussianScore([0.0, 0.0], np.eye(2), VP())
    onsets = []
    for seed in range(8):
        rows, held_out = exact.sample(400, seeded(seed)), exact.sample(2000, seeded(100 + seed))
        monitor = MemorisationMonitor(rows, held_out, OBJECTIVE, n_draws=2000, stop=None, seed=200 + seed)
        look(monitor, exact)
        assert monitor.memorised[0] > 0.05
        onsets.append(monitor.tau_mem)
    assert onsets == [None] * 8


# ------------------------------------------------------------------ stopping


def monitored(**settings):
    rows, held_out = law().sample(40, seeded(0)), law().sample(200, seeded(1))
    settings = {"n_draws": 20, "sampler": ProbabilityFlow(8)} | settings
    return rows, MemorisationMonitor(rows, held_out, OBJECTIVE, **settings)


def test_it_stops_once_the_held_out_loss_has_stopped_improving():
    shifts = [3.0, 2.0, 1.0, 0.0, 0.5, 1.0, 0.4, 2.0]
    for patience in (1, 2, 4):
        _, monitor = monitored(patience=patience)
        asked = [look(monitor, law(shift=shift), i) for i, shift in enumerate(shifts)]
        assert asked.index(True) == 3 + patience
        assert monitor.tau_gen == 3


def test_it_stops_once_memorisation_has_begun():
    rows, monitor = monitored(stop="onset")
    assert not look(monitor, law(), 1)
    assert not look(monitor, law(shift=3.0), 2)
    assert look(monitor, EmpiricalScore(rows, VP()), 3)
    assert monitor.tau_mem == 3
    rows, watching = monitored(stop=None, patience=1)
    for step in range(4):
        assert not look(watching, EmpiricalScore(rows, VP()), step)
    assert watching.tau_mem == 0


def test_it_looks_at_each_kth_evaluation():
    _, monitor = monitored(every=3, stop=None)
    for step in range(8):
        look(monitor, law(), step)
    assert monitor.step == [0, 3, 6]
    lists = (monitor.train_loss, monitor.held_out_loss, monitor.memorised, monitor.dial)
    assert all(len(values) == 3 for values in lists)
    assert len(set(monitor.held_out_loss)) == 1  # the same noise each time: changes are the model's


def test_wrong_arguments_are_refused():
    rows = law().sample(40, seeded(0))
    with pytest.raises(ValueError, match="held_out"):
        MemorisationMonitor(rows, rows, OBJECTIVE, stop="early")
    with pytest.raises(ValueError, match="independent pairs"):
        MemorisationMonitor(rows, rows, FlowMatching(pairing="optimal_transport"))
    with pytest.raises(ValueError, match="at least 2 rows"):
        MemorisationMonitor(rows[:1], rows, OBJECTIVE)


# ------------------------------------------------------------------ beside a training


def network(seed=0, width=32):
    return NetworkScore(MLP(2, width, 2, generator=seeded(seed)), VP())


def two_assets(n, seed):
    return torch.randn(n, 2, generator=seeded(seed))


def test_a_network_on_forty_rows_generalises_first_and_memorises_then():
    rows, held_out = two_assets(40, 0), two_assets(500, 1)
    monitor = MemorisationMonitor(rows, held_out, OBJECTIVE, n_draws=500, stop=None, onset=0.1)
    settings = {"batch": 40, "learning_rate": 6e-3, "weight_decay": 0.0, "ema_decay": 0.98, "patience": None}
    history = train(
        network(),
        rows,
        OBJECTIVE,
        steps=1500,
        evaluate_every=100,
        callbacks=[monitor],
        generator=seeded(2),
        **settings,
    )
    assert monitor.step == history.step
    assert monitor.tau_mem is not None
    assert monitor.tau_mem > monitor.tau_gen
    best = monitor.step.index(monitor.tau_gen)
    assert abs(monitor.dial[best]) < 0.25
    assert monitor.dial[-1] > 0.4
    assert monitor.memorised[-1] > monitor.floor + 0.12
    assert monitor.held_out_loss[-1] > 1.3 * monitor.held_out_loss[best]
    assert monitor.train_loss[-1] < 0.95 * monitor.train_loss[best]


@pytest.mark.parametrize("stop", [None, "held_out"])
def test_the_monitor_leaves_the_training_as_it_is(stop):
    """Same bits with and without it, and where it stops, the bits of that step."""
    rows, held_out = two_assets(40, 0), two_assets(60, 1)
    watched, alone = network(width=16), network(width=16)
    patience = 50 if stop is None else 1
    monitor = MemorisationMonitor(rows, held_out, OBJECTIVE, n_draws=20, stop=stop, patience=patience)
    settings = {"batch": 16, "learning_rate": 2e-2, "evaluate_every": 10, "patience": None}
    a = train(watched, rows, OBJECTIVE, steps=120, callbacks=[monitor], generator=seeded(3), **settings)

    def stop_there(evaluation):
        return evaluation.step >= a.step[-1]

    b = train(alone, rows, OBJECTIVE, steps=120, callbacks=[stop_there], generator=seeded(3), **settings)
    assert a.train_loss == b.train_loss
    assert a.step[-1] == 120 if stop is None else a.step[-1] < 120
    assert monitor.step == a.step
    weights = alone.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in watched.state_dict().items())
    assert all(w.requires_grad for w in watched.parameters())
