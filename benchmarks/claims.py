"""The one table of claims, and the passages that quote their figures.

A claim without a script is a closed question: its results stay, its scripts, of their names, are in git at `CLOSED`.
"""

from typing import NamedTuple

from benchmarks.lib.quotes import Quote

CLOSED = "d4b5c48"


class Claim(NamedTuple):
    """A line of the table.

    Attributes:
        name: Of the claim.
        says: It, in one sentence.
        script: Module under `benchmarks`; None for a closed question.
        minutes: Of one processor, about.
        seeds: How many, or what is repeated.
        results: Stems of its files under results/, separated by blanks.
        peers: Whether it runs in `.venv-bench`.
        at: Of a closed question, the commit that has its script.
    """

    name: str
    says: str
    script: str | None
    minutes: int
    seeds: str
    results: str
    peers: bool = False
    at: str = CLOSED

    @property
    def command(self) -> str:
        """Command that runs it, or shows its script."""
        if self.script is None:
            return f"git show {self.at}:benchmarks/{self.results.split()[0]}.py"
        return f"{'.venv-bench/bin/' if self.peers else ''}python -m benchmarks.{self.script}"


CLAIMS = (
    # the model's posterior, exactly
    Claim("posteriors", "Far more effective draws a second than NUTS", "posteriors.posteriordb", 15, "1", "posteriors"),
    Claim(
        "ordinary", "Ordinary models faster than the best NUTS", "posteriors.ordinary", 240, "1",
        "ordinary ordinary_reference",
    ),
    Claim("trust", "A run is right, or it says that it is not", "posteriors.trust", 60, "3 of 20", "trust"),
    Claim("guides", "Guides cover modes that SVI misses, at equal time", "guides.elbo", 60, "1", "guides"),
    Claim("modes", "Separated modes get their shares", "posteriors.modes", 3, "3", "modes"),
    Claim("kernels", "Which bridge to propose from", "posteriors.proposals", 48, "1", "bridge_kernels"),
    Claim("exactness", "Any bridge leaves the target invariant", "exactness.geweke", 40, "1", "geweke"),
    Claim(
        "rates", "Calibration's verdicts and the mode audit are right as often as they say",
        "calibration.rates", 30, "30 to 1,000 runs", "calibration_rates mode_audit_rates local_c2st_rates",
    ),
    # bridges
    Claim("bass", "LightSBBM is exact between scalar Gaussians", "exactness.bass", 1, "1", "bass_oracle"),
    Claim("plans", "LightSB finds known plans from unpaired draws", "exactness.plans", 15, "1", "known_plans"),
    Claim("planar", "LightSBBM beside the paper's algorithm, equal time", "light.planar", 45, "5", "planar"),
    Claim("tails", "Inside TailMatched a light bridge has the target's tails", "light.tails", 8, "2", "tails"),
    Claim("stretched", "VSDM and SGM on stretched shapes at few evaluations", "vsdm.stretched", 60, "5", "stretched"),
    Claim("series", "A series' next window beside autoregressions", "conditional.time_series", 4, "3", "time_series"),
    Claim("dsb-gaussian", "DSB keeps the closed-form coupling", "dsb.gaussian", 210, "3", "dsb_gaussian"),
    Claim("dsb-planar", "DSB on the published pairs, both directions, weights", "dsb.planar", 60, "3", "dsb_planar"),
    Claim("dsb-oxygen", "A posterior learnt from pairs, then weighted", "dsb.oxygen", 15, "3", "dsb_oxygen"),
    Claim("dsb-digits", "Even digits carried to odd ones", "dsb.digits", 80, "3", "dsb_digits"),
    Claim("latent", "Latent bridges against data space at equal time", "latent.digits", 60, "3", "latent_digits"),
    Claim("attention", "Faster and smaller than distances and a softmax", "speed.attention", 1, "7 runs", "attention"),
    Claim("threads", "A run chooses the better number of threads", "speed.threads", 15, "2 runs", "threads"),
    Claim("imports", "Importing pyro_sb costs little beside Pyro", "speed.imports", 1, "7 runs", "imports"),
    # amortised posteriors
    Claim("amortised", "Amortised posteriors on sbibm's tasks", "amortised.sbibm", 60, "1, 3 or 5 data", "amortised"),
    Claim("peers", "sbi on the same tasks", "amortised.sbi_peers", 90, "1, 3 or 5 data", "sbi_peers", peers=True),
    Claim("likelihood", "Learned likelihoods beside exact", "amortised.likelihood", 8, "1", "likelihood", peers=True),
    Claim("training", "Training time beside NPE", "amortised.training_time", 5, "3 fits", "training_time", peers=True),
    Claim("calibration", "Amortised posteriors are calibrated", "calibration.posteriors", 8, "1", "calibration"),
    # closed questions
    Claim("unchanged", "The move into folders changed no draw", None, 10, "1", "unchanged", at="00c16db"),
    Claim("flows", "Files that five calls enter", None, 1, "1", "flows", at="00c16db"),
    Claim("moves", "ESS that each move of KernelLangevin buys", None, 7, "1", "moves"),
    Claim("steps", "The kernel-Langevin bridge over steps and bandwidths", None, 3, "1", "bridge_experiments"),
    Claim("dynamics", "The same as an emulator of dynamics", None, 2, "1", "bridge_dynamics"),
    Claim("beta", "When a finite beta pays", None, 60, "1 or 2", "beta_sweep"),
    Claim("volatility", "Volatility control on a heteroskedastic series", None, 4, "1", "heteroskedastic"),
    Claim("growth", "Light bridges' work over dimension and components", None, 40, "1", "scaling"),
    Claim("translation", "Digits carried from {1, 7} to {4, 9}", None, 6, "1", "translation"),
    Claim("dsb-short", "DSB in few steps; the bias of published steps", None, 60, "1 to 3", "dsb_short"),
    Claim("vsdm-matrix", "VSDM's matrix on its way to the fixed point", None, 5, "1", "vsdm_gaussian"),
    Claim("inverse", "Path weights of VSDM are unbiased", None, 15, "1", "linear_gaussian"),
    Claim("halves", "The lower half of a digit given the upper", None, 3, "3", "digits"),
    Claim("latent-rates", "The latent bridge's error over rows, steps and shift", None, 60, "3", "latent_rates"),
)  # fmt: skip


def rows_of(file: str, after: str, rows: dict[str, str]) -> tuple[Quote, ...]:
    """Lines of a table of the README: how each begins, and the pattern of the file's lines."""
    return tuple(Quote(f"| {start} |", file, after, rows=pattern) for start, pattern in rows.items())


POSTERIORS = {
    "eight schools, non-centred": "eight_schools_noncentered",
    "eight schools, centred (a funnel)": "eight_schools_centered",
    "low_dim_gauss_mix": "low_dim_gauss_mix ",
    "the same without its ordering (two modes)": "low_dim_gauss_mix_unordered",
    "arK": "arK",
    "logearn_interaction": "logearn_interaction",
    "kidscore_interaction": "kidscore_interaction",
}
TARGETS = (
    *(f"two modes, d {dim}" for dim in (2, 10, 20)),
    *("banana", "eight schools", "funnel 10", "low_dim_gauss_mix", "low_dim_gauss_mix_unordered", "arK"),
    *("logearn_interaction", "kidscore_interaction"),
)
PLANAR = {
    "`LightSBBM`": "^LightSBBM dual",
    "the paper's alternation, same time": "^LightSBBM alternating",
    "`LightSBM`": "^LightSBM ",
    "`LightSB`": "^LightSB ",
    "floor: the target's own draws": "^floor",
}
SBI = {f"sbi {method}": f"sbi {method}" for method in ("NPE", "FMPE", "NPSE")}
QUOTES = (
    *(Quote(f"| {start} |", "posteriors.txt", section=f"## {name}") for start, name in POSTERIORS.items()),
    Quote("In all 30 runs", "modes.txt", beside=".009 1.008"),
    *rows_of("bridge_kernels.txt", "Every bridge as a kernel", {name: f"^{name} " for name in TARGETS}),
    Quote("`BridgeMH` leaves the target", "geweke.txt", beside="3,040"),
    Quote("an sd 20 % too small is called bad", "calibration_rates.txt", until="A mode that"),
    Quote("is found by `mode_audit`", "mode_audit_rates.txt"),
    Quote("unattended, W2 to the law", "bridge_experiments.txt", until="on a Gaussian"),
    Quote("Schrödinger-Bass bridges", "bass_oracle.txt"),
    *rows_of("planar.txt", "The plane, beside the paper's algorithm", PLANAR),
    Quote("W2 of `LightSBBM` at 10,000 draws", "planar.txt"),
    Quote("By W2, the published metric", "beta_sweep.txt"),
    Quote("conditional BW2-UVP of `LightSB`", "known_plans.txt", until="`LightSBM` at like cost"),
    Quote("a point to Student-t(nu)", "tails.txt"),
    Quote("in 16 latent dimensions at epsilon = 1", "translation.txt"),
    Quote("volatility control follows the state's", "heteroskedastic.txt"),
    Quote("an update of `LightSB` takes", "scaling.txt", until="`LightSB`'s sliced W2"),
    *rows_of("amortised.txt", "beside sbi**", {"light bridge": " light  ", "VSDM": " vsdm "} | SBI),
    Quote("| the light bridge corrected by `mcmc` |", "amortised.txt", section="Corrected"),
    Quote("10,000 draws take", "amortised.txt", until="Timed side"),
    Quote("the light bridge trains in", "training_time.txt"),
    Quote("times learnt from 5,000", "likelihood.txt"),
    Quote("ranks of 500 data sets", "calibration.txt"),
    Quote("at ten evaluations from the moment-matched", "stretched.txt", until="with straighter"),
    Quote("Path weights give the evidence", "linear_gaussian.txt"),
    Quote("Lower halves of digits", "digits.txt"),
    Quote("Between Gaussians at d = 5, 20, 50", "dsb_gaussian.txt"),
    Quote("is beaten by 2.29 to", "ordinary.txt", until="times in effective"),
    Quote("On five runs and fits, medians of two", "threads.txt"),
    Quote("`import pyro_sb` takes", "imports.txt"),
    Quote("W2 at 10,000 draws, IMF", "dsb_planar.txt"),
    Quote("Twelve steps at a short horizon", "dsb_short.txt", beside=".285"),
    Quote("IMF .285", "dsb_short.json", until=", IPF"),
    Quote("An oxygen-demand posterior", "dsb_oxygen.txt"),
    Quote("Even digits carried to odd ones", "dsb_digits.txt"),
    Quote("twelve latent dimensions", "latent_digits.txt"),
    Quote("at 100,000 points, 256 queries", "attention.txt"),
)
