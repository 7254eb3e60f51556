"""Every example runs with small flags, in an empty folder, and says and draws what it should."""

from pathlib import Path

import matplotlib.image
import pytest

from tests.ranks import as_script, processes

ROOT = Path(__file__).parents[1]

# name: (small flags, pictures it writes, words of its report). Where chains are not said to be too
# short, a ConvergenceWarning is an error.
TOO_SHORT = "these draws may be wrong"
EXAMPLES = {
    "quickstart.py": (
        "--num-steps 3 --num-samples 60 --warmup-steps 50 --num-chains 8"
        " --output pictures/moons.png",
        ["pictures/moons.png"],
        ["trained", "R-hat", "exact", "upper moon with probability", "moons.png"],
    ),
    "contrastive_divergence.py": (
        "--num-steps 3 --batch-size 20 --output contrastive.png",
        ["contrastive.png"],
        ["acceptance", "log Z", "held-out", "contrastive.png"],
    ),
    "score_matching.py": (
        "--num-steps 3 --batch-size 20 --output scores.png",
        ["scores.png"],
        ["score error", "KL(data || model)", "scores.png"],
    ),
    "noise_contrastive.py": (
        "--num-steps 3 --batch-size 20 --output noises.png",
        ["noises.png"],
        ["accuracy", "log Z learned", "noises.png"],
    ),
    "flow_nce.py": (
        "--warm-up 3 --num-steps 3 --batch-size 20 --output flow.png",
        ["flow.png"],
        ["learned log Z", "log-likelihood", "flow.png"],
    ),
    "latent_ebm.py": (
        "--num-steps 3 --num-chains 16 --num-samples 90 --output latent.png",
        ["latent.png"],
        ["energy prior", "log-likelihood", "latent.png"],
    ),
    "joint_classifier.py": (
        "--seeds 2 --num-steps 3 --num-draws 2 --output joint.png",
        ["joint.png"],
        ["accuracy", "ECE", "network, noise", "joint", "spread", "joint.png"],
    ),
    "bayesian_network.py": (
        "--num-chains 2 --num-steps 3 --warmup-steps 20 --num-samples 20 --output bayesian.png",
        ["bayesian.png"],
        ["accuracy", "ECE", "ensemble of 2", "SGHMC", "bayesian.png"],
    ),
    "anomaly.py": (
        "--num-steps 3 --output anomaly.png",
        ["anomaly.png"],
        ["Area under the ROC curve", "anomaly.png"],
    ),
    "image_energy.py": (
        "--num-steps 3 --frames 2 --num-images 6 --num-samples 5 --output image.png",
        ["image.png", "image.gif"],
        ["spread of the draws", "Mean squared error", "Area under the ROC curve", "image.png"],
    ),
    "rbm_digits.py": (
        "--num-epochs 1 --num-hidden 6 --num-features 8 --output rbm.png",
        ["rbm.png"],
        ["independent pixels", "scikit-learn", "pyro_ebm", "bound", "rbm.png"],
    ),
    "ising.py": (
        "--sides 4 6 --num-samples 20 --num-chains 4 --num-temperatures 3 --output ising.png",
        ["ising.png"],
        ["4 x 4", "ESS", "R-hat", "ising.png"],
    ),
    "log_normalizer.py": (
        "--num-epochs 1 --num-hidden 6 --num-large 8 --num-chains 20 --max-temperatures 30"
        " --output sandwich.png",
        ["sandwich.png"],
        ["exact log Z", "upper bound", "sandwich.png"],
    ),
    "ising_posterior.py": (
        "--side 4 --num-inner-steps 3 --num-samples 30 --warmup-steps 20 --num-chains 4"
        " --output posterior.png",
        ["posterior.png"],
        ["exchange", "exact", "naive", "refuses", "posterior.png"],
    ),
    "distributed_training.py": (
        "--num-steps 4 --every 2 --batch-size 16 --channels 4 --checkpoint training.ckpt",
        [],
        ["from step 0", "step 4: saved", "held-out digit", "one process", "ms/step"],
    ),
    "distributed_sampling.py": (
        "--num-samples 20 --warmup-steps 20 --num-chains 4 --num-data 50 --dim 2",
        [],
        ["rank 0 of 1: step size", "w[1]", "r_hat", "4 chains in one process"],
    ),
    "denoise.py": (
        "--num-steps 3 --num-images 6 --num-samples 50 --num-chains 4 --output denoise.png",
        ["denoise.png"],
        ["PSNR", "denoise.png"],
    ),
}


def test_every_example_is_listed():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    flags, pictures, words = EXAMPLES[name]
    out = tmp_path / "output.txt"
    strict = None if TOO_SHORT in words else TOO_SHORT
    args = (ROOT / "examples" / name, flags, tmp_path, out, strict)
    process = processes.Process(target=as_script, args=args)
    process.start()
    process.join(600)
    report = out.read_text()
    assert process.exitcode == 0, report
    for word in words:
        assert word in report
    for picture in pictures:
        pixels = matplotlib.image.imread(tmp_path / picture)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.05  # not blank
