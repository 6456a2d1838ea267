# SPDX-License-Identifier: Apache-2.0
"""Published numbers of the laboratory: equilibria, iterates, fixed points, gradients.

All were computed independently (plain numpy, float64, fourteen digits). Games: dice,
three intransitive dice; types, three kinds of people, epsilon 0.1; skew, a cycle of
unequal strength; elo, a Bradley-Terry game. References: u uniform, m (.5, .3, .2).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.evaluation import exact
from nlhf_jax.games import matrices, solutions, solvers
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import POLICY, REFERENCE

EXACT = 1e-12
TAU = 0.1
START = np.array([0.6, 0.3, 0.1])
REFERENCES = {"u": np.ones(3) / 3, "m": np.array([0.5, 0.3, 0.2])}
GAMES = {
    "dice": matrices.cyclic(1 / 18, 1 / 18, 1 / 18),
    # P(2 > 1) = 2/3 - e/2, P(3 > 1) = 1/3 - e/4, P(3 > 2) = 2/3 + e/4 with e = 0.1.
    "types": 0.5 + np.array([[0, -7, 11.5], [7, 0, -11.5], [-11.5, 11.5, 0]]) / 60,
    "skew": matrices.skew(),
    "elo": matrices.bradley_terry(np.log([1.0, 9.0, 2.0])),
}

# (game, reference, tau): equilibrium, its KL to the reference, its exploitability.
KNOWN_NASH = {
    ("dice", "m", 1.0): (
        (0.50261311315578, 0.29505492620324, 0.20233196064098),
        6.1341122605506e-05,
        0.011531010386252,
    ),
    ("dice", "m", 0.1): (
        (0.51034768470859, 0.25833187869982, 0.23132043659159),
        0.0054777730165498,
        0.014000878111598,
    ),
    ("dice", "m", 0.05): (
        (0.49169071069121, 0.23862068000003, 0.26968860930876),
        0.017761705042801,
        0.01405944614951,
    ),
    ("dice", "m", 0.01): (
        (0.3701981345107, 0.2821211096533, 0.347680755836),
        0.063650519135921,
        0.0048931680476334,
    ),
    ("types", "u", 1.0): (
        (0.34208772255146, 0.32556425972176, 0.33234801772678),
        0.00020667278345769,
        0.025717539763428,
    ),
    ("types", "u", 0.1): (
        (0.40303845916314, 0.31317289012073, 0.28378865071613),
        0.011329123847496,
        0.017855987539841,
    ),
    ("types", "u", 0.05): (
        (0.41112572600687, 0.33509135248117, 0.25378292151195),
        0.01880137009023,
        0.0095477355003205,
    ),
    ("types", "u", 0.01): (
        (0.39262857632393, 0.37301307866059, 0.23435834501548),
        0.023672047832508,
        0.0014004902842324,
    ),
    ("types", "m", 1.0): (
        (0.50069020362888, 0.30657455640582, 0.1927352399653),
        0.000205565958884,
        0.021472936096687,
    ),
    ("types", "m", 0.1): (
        (0.45618172400372, 0.37167669124428, 0.172141584752),
        0.011967918267521,
        0.020227397389635,
    ),
    ("types", "m", 0.05): (
        (0.41721304233883, 0.39508711736938, 0.1876998402918),
        0.021342771890791,
        0.012699052216935,
    ),
    ("types", "m", 0.01): (
        (0.38644598036167, 0.39065379141519, 0.22290022822315),
        0.027757185865388,
        0.0023628206327581,
    ),
    ("skew", "u", 1.0): (
        (0.32004071897027, 0.32434745416712, 0.35561182686261),
        0.0011193013920194,
        0.06357747027437,
    ),
    ("skew", "u", 0.1): (
        (0.19620415406661, 0.36637768013818, 0.4374181657952),
        0.049511866315053,
        0.022223478206166,
    ),
    ("skew", "u", 0.05): (
        (0.16442111230067, 0.42341811672005, 0.41216077097928),
        0.072580063378748,
        0.0083318546377948,
    ),
    ("skew", "u", 0.01): (
        (0.1612445542265, 0.48699975514946, 0.35175569062404),
        0.086454808284846,
        0.002926658217104,
    ),
    ("skew", "m", 1.0): (
        (0.49517886046652, 0.27861170367047, 0.22620943586301),
        0.0024514231816047,
        0.12069248777291,
    ),
    ("skew", "m", 0.1): (
        (0.29443684584269, 0.28976051229666, 0.41580264186064),
        0.13834333730548,
        0.059355002523142,
    ),
    ("skew", "m", 0.05): (
        (0.21211550993268, 0.36642672309595, 0.42145776697138),
        0.20556259548598,
        0.026991980670208,
    ),
    ("skew", "m", 0.01): (
        (0.16885718830575, 0.47215804379767, 0.35898476789659),
        0.24082738058691,
        0.0034413521119576,
    ),
    ("elo", "u", 1.0): (
        (0.27233594604156, 0.41712469022668, 0.31053936373176),
        0.01649984633235,
        0.20774235778582,
    ),
    ("elo", "u", 0.1): (
        (0.016709156046339, 0.94356413915753, 0.039726704796126),
        0.84728157640383,
        0.019323977580939,
    ),
    ("elo", "u", 0.05): (
        (0.00033379747481972, 0.99794567847457, 0.0017205240506106),
        1.0829366849183,
        0.00068095846057681,
    ),
    ("elo", "m", 1.0): (
        (0.42242725687146, 0.38436217013668, 0.19321057299186),
        0.017355790686226,
        0.23044699415508,
    ),
    ("elo", "m", 0.1): (
        (0.028199387626776, 0.94501553729948, 0.026785075073744),
        0.94939610491102,
        0.019802278937811,
    ),
    ("elo", "m", 0.05): (
        (0.00055706500486422, 0.99829508255038, 0.001147852444757),
        1.1905053962541,
        0.00058805177982302,
    ),
}

# Nash-MD with falling steps on skew: policy, KL(pi*, pi), gap after T steps.
KNOWN_NASH_MD = {
    1: (
        (0.38496419955651, 0.10378533900537, 0.51125046143812),
        0.13264633353301,
        0.020344032457445,
    ),
    2: (
        (0.31345282000569, 0.12122087960348, 0.56532630039083),
        0.10635050150067,
        0.017181545249574,
    ),
    3: (
        (0.27959759277367, 0.14782401580032, 0.57257839142601),
        0.077212979466124,
        0.014125858542097,
    ),
    10: (
        (0.26276524046087, 0.25930625840514, 0.47792850113399),
        0.0077836977508063,
        0.0017996984856765,
    ),
    100: (
        (0.29229072455251, 0.28697658898585, 0.42073268646164),
        5.0317463819439e-05,
        1.1471278501984e-05,
    ),
    1000: (
        (0.29421661633203, 0.28949981390183, 0.41628356976614),
        4.7766186801084e-07,
        1.0878321299312e-07,
    ),
}

# Where a fixed beta stops on skew: policy, its mixture, KL(pi*, pi), gap at tau.
KNOWN_FIXED_POINTS = {
    0.0: (
        (0.29443684584269, 0.28976051229666, 0.41580264186064),
        (0.29443684584269, 0.28976051229666, 0.41580264186064),
        0.0,
        0.0,
    ),
    0.125: (
        (0.29027545645, 0.26936720760175, 0.44035733594826),
        (0.31616268330595, 0.27782551094024, 0.40601180575381),
        0.0014805683019676,
        0.00033240486588182,
    ),
    0.25: (
        (0.28790787373786, 0.24466459988867, 0.46742752637346),
        (0.34213685473836, 0.26651758355375, 0.39134556170789),
        0.0069573380219475,
        0.0015189424865019,
    ),
    0.375: (
        (0.28822056911576, 0.21626083187764, 0.4955185990066),
        (0.37243079380739, 0.2569717385368, 0.37059746765581),
        0.018128576842776,
        0.0037827172263135,
    ),
    0.5: (
        (0.29245118722576, 0.18597113094348, 0.52157768183077),
        (0.40612197970308, 0.25085813629936, 0.34301988399756),
        0.036249914215479,
        0.0070944868905131,
    ),
    0.75: (
        (0.31987794095902, 0.13217439511327, 0.54794766392771),
        (0.47125377683514, 0.25757816300771, 0.27116806015716),
        0.088292354020506,
        0.014676402053617,
    ),
    1.0: (
        (0.38496419955651, 0.10378533900537, 0.51125046143812),
        (0.5, 0.3, 0.2),
        0.13264633353301,
        0.020344032457445,
    ),
}

# Iterates of skew from START: (method, step size or its usual one): {step: policy}.
KNOWN_ITERATES = {
    ("mirror_descent", 1.0): {
        1: (0.6068748571281, 0.26864950610567, 0.12447563676623),
        2: (0.60440312609674, 0.24333052392826, 0.15226634997499),
        10: (0.42512021482244, 0.17965505923369, 0.39522472594387),
        100: (0.29445214784699, 0.28976987306079, 0.41577797909222),
    },
    ("nash_md", 1.0): {
        1: (0.60618328718922, 0.26956517193927, 0.12425154087152),
        2: (0.60355799236082, 0.24489125119868, 0.1515507564405),
        10: (0.43401046933792, 0.17636361124817, 0.3896259194139),
        100: (0.29097842960733, 0.2738133655387, 0.43520820485397),
    },
    ("egpo", 1.0): {
        1: (0.60305275982758, 0.27090685292368, 0.12604038724875),
        2: (0.59700849545745, 0.24786777679047, 0.15512372775208),
        10: (0.41688633361605, 0.19658329679985, 0.3865303695841),
        100: (0.2944353245209, 0.28976548647667, 0.41579918900243),
    },
    ("nash_mp", None): {
        1: (0.59727760893386, 0.25457366603879, 0.14814872502735),
        2: (0.5711498427009, 0.22550158201732, 0.20334857528178),
        10: (0.31039451126038, 0.24002774820163, 0.449577740538),
        100: (0.29443684627222, 0.28976051217784, 0.41580264154994),
    },
    ("mmd", None): {
        1: (0.60647225490705, 0.27145971805613, 0.12206802703683),
        2: (0.60520235569417, 0.2479234866652, 0.14687415764062),
        10: (0.4486437106676, 0.17933873218136, 0.37201755715104),
        100: (0.29441025007378, 0.289814548896, 0.41577520103021),
    },
    ("mwu", None): {
        1: (0.61629663593894, 0.26789127795105, 0.11581208611002),
        2: (0.62598187768865, 0.23880838462761, 0.13520973768374),
        10: (0.43162466416671, 0.11149170937517, 0.45688362645811),
        100: (0.69082406860432, 0.12096907646252, 0.18820685493316),
    },
    ("omwu", None): {
        1: (0.61629663593894, 0.26789127795105, 0.11581208611002),
        2: (0.6229254831074, 0.23990769006512, 0.13716682682748),
        10: (0.40931610548902, 0.1313199290995, 0.45936396541149),
        100: (0.10908121686786, 0.22738660590005, 0.66353217723209),
    },
    ("oomd", 1.0): {
        1: (0.6068748571281, 0.26864950610567, 0.12447563676623),
        2: (0.60050521559613, 0.2453377926002, 0.15415699180367),
        10: (0.41697643490742, 0.19630271497467, 0.38672085011791),
        100: (0.29443497632103, 0.28976476420794, 0.41580025947103),
    },
}

# Policy gradients on skew: beta: opponent, advantage, ascent direction, IPO gradient,
# hard- and soft-label IPO losses.
KNOWN_GRADIENTS = {
    0.0: (
        (0.38832576801688, 0.2603025466939, 0.35137168528922),
        (-0.040712821108894, -0.035431091123659, 0.062291114281059),
        (-0.014588433779151, -0.0084040718363227, 0.022992505615474),
        (1.1670747023321, 0.67232574690581, -1.8394004492379),
    ),
    0.125: (
        (0.40352467091312, 0.26676934940661, 0.32970597968027),
        (-0.032919748883666, -0.040637442263803, 0.06620410487866),
        (-0.012744999389469, -0.010552163818925, 0.023297163208394),
        (0.9885671115942, 0.81824725515885, -1.806814366753),
    ),
    0.25: (
        (0.41844329857044, 0.27282620685027, 0.3087304945793),
        (-0.025415731864643, -0.045718716305363, 0.07007400743149),
        (-0.010976987801053, -0.012643013523541, 0.023620001324594),
        (0.80144974581946, 0.96568238564735, -1.7671321314668),
    ),
    0.5: (
        (0.44726791237655, 0.28365109941894, 0.26908098820451),
        (-0.011355901438471, -0.055448589704064, 0.077638902316455),
        (-0.007686060137054, -0.016629559231017, 0.024315619368071),
        (0.40933495028552, 1.2601497018148, -1.6694846521003),
    ),
    1.0: (
        (0.5, 0.3, 0.2),
        (0.012638175139093, -0.072903106049206, 0.091823638545386),
        (-0.0021578938236723, -0.023713092827997, 0.02587098665167),
        (-0.39301166700926, 1.8171837483136, -1.4241720813044),
    ),
}


@pytest.fixture(autouse=True)
def _exact(float64):
    """Everything here is float64 mathematics."""


def skew(tau=TAU):
    return solvers.make_game(GAMES["skew"], REFERENCES["m"], tau)


def assert_near(found, known):
    np.testing.assert_allclose(found, known, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name, reference, tau", KNOWN_NASH)
def test_regularised_equilibria(name, reference, tau):
    game, mu = GAMES[name], REFERENCES[reference]
    policy, divergence, exploitability = KNOWN_NASH[name, reference, tau]
    nash = solutions.regularised_nash(game, mu, tau)
    assert_near(nash, policy)
    assert_near(solutions.kl(nash, mu), divergence)
    assert_near(solutions.exploitability(game, nash), exploitability)
    assert_near(solvers.gap(solvers.make_game(game, mu, tau), jnp.asarray(nash)), 0.0)
    bare = solvers.make_game(game, mu, 0.0)
    assert_near(solvers.gap(bare, jnp.asarray(nash)), exploitability)


@pytest.mark.parametrize("method, size", KNOWN_ITERATES)
def test_iterates(method, size):
    policies = solvers.solve(method, skew(), START, step_size=size, num_steps=100)
    for step, policy in KNOWN_ITERATES[method, size].items():
        assert_near(policies[step - 1], policy)


def test_nash_md_with_falling_steps():
    nash = solutions.regularised_nash(GAMES["skew"], REFERENCES["m"], TAU)
    policies = solvers.solve("nash_md", skew(), START, num_steps=1000)
    for step, (policy, divergence, gap) in KNOWN_NASH_MD.items():
        found = policies[step - 1]
        assert_near(found, policy)
        assert_near(solutions.kl(nash, np.asarray(found)), divergence)
        assert_near(solvers.gap(skew(), found), gap)


@pytest.mark.parametrize("beta", KNOWN_FIXED_POINTS)
def test_where_a_fixed_beta_stops(beta):
    game, mu = GAMES["skew"], REFERENCES["m"]
    policy, mixture, divergence, gap = KNOWN_FIXED_POINTS[beta]
    found = solvers.solve("fixed_mixture", skew(), START, beta=beta, num_steps=800)[-1]
    assert_near(found, policy)
    assert_near(solutions.geometric_mixture(np.asarray(found), mu, beta), mixture)
    nash = solutions.regularised_nash(game, mu, TAU)
    assert_near(solutions.kl(nash, np.asarray(found)), divergence)
    assert_near(solvers.gap(skew(), found), gap)
    if beta:  # Nash-MD whose step size makes the same mixture stops there too.
        same = solvers.solve(
            "nash_md", skew(), START, step_size=beta / TAU, num_steps=800
        )
        assert_near(same[-1], policy)
    if 0 < beta < 1:
        assert_near(solutions.regularised_nash(game, mu, TAU / (1 - beta)), mixture)


# Exploitability of weights on the dice from START after T steps: last and average
# policies of plain weights with s = 1, last policies of optimistic ones with s = 2.
WEIGHTS_ON_DICE = {
    ("mwu", 1.0): {
        1: 0.0175,
        100: 0.0297,
        1000: 0.0368,
        10_000: 0.0543,
        20_000: 0.0551,
    },
    ("omwu", 2.0): {100: 0.0219, 1000: 0.0047, 10_000: 3.8e-11},
}
AVERAGES_ON_DICE = {100: 0.0194, 1000: 8.6e-4, 20_000: 1.9e-4}


@pytest.mark.parametrize("method, size", WEIGHTS_ON_DICE)
def test_weights_without_regularisation(method, size):
    game = solvers.make_game(GAMES["dice"], REFERENCES["u"], 0.0)
    path = solvers.solve(method, game, START, step_size=size, num_steps=20_000)
    for step, known in WEIGHTS_ON_DICE[method, size].items():
        found = solvers.gap(game, path[step - 1])
        # Half a unit of the last digit that is known.
        assert abs(found - known) < (5e-5 if known > 1e-3 else 5e-13)
    if method == "mwu":
        np.testing.assert_allclose(path[-1], [0.9962, 0.0035, 0.0003], atol=5e-5)
        mean = np.cumsum(np.vstack([START, path]), axis=0)
        for step, known in AVERAGES_ON_DICE.items():
            found = solvers.gap(game, jnp.asarray(mean[step - 1] / step))
            assert abs(found - known) < (5e-5 if known > 1e-3 else 5e-6)


@pytest.mark.parametrize("method, known", [("omd", 0.046), ("nash_md", 0.072)])
def test_cycles_at_the_papers_tau(method, known):
    # tau .008, s = 2.325: a gap known after 20,000 steps, at some place of the cycle.
    # From every start the gaps run over the same range: it is one limit cycle.
    game, ranges = skew(0.008), []
    for start in (START, *REFERENCES.values()):
        path = solvers.solve(method, game, start, step_size=2.325, num_steps=20_000)
        gaps = jax.vmap(solvers.gap, in_axes=(None, 0))(game, path[-400:])
        ranges.append((gaps.min(), gaps.max()))
    np.testing.assert_allclose(ranges, [ranges[0]] * 3, rtol=0, atol=2e-3)
    assert ranges[0][0] < known < ranges[0][1]


# Softmax logits (.3, -.1, .2), tau .05: the policy, and its KL to the reference.
LOGITS, TAU_OF_GRADIENTS = np.array([0.3, -0.1, 0.2]), 0.05
POLICY_OF_GRADIENTS = (0.38832576801688, 0.2603025466939, 0.35137168528922)


@pytest.mark.parametrize("beta", KNOWN_GRADIENTS)
def test_policy_gradients(beta):
    game, mu, tau = GAMES["skew"], REFERENCES["m"], TAU_OF_GRADIENTS
    mixture, advantage, ascent, _ = KNOWN_GRADIENTS[beta]
    policy = solutions.normalise(LOGITS)
    assert_near(policy, POLICY_OF_GRADIENTS)
    assert_near(solutions.kl(policy, mu), 0.062906139467954)
    opponent = solutions.geometric_mixture(policy, mu, beta)
    assert_near(opponent, mixture)
    assert_near(game @ opponent - 0.5 - tau * np.log(policy / mu), advantage)
    model = tabular.tabular_model(3, 1)
    found = exact.expected_gradient(
        model,
        ALGORITHMS["nash_md_pg"](tau=tau, beta=beta),
        table_judge(model, game, np.zeros(3)),
        {POLICY: tabular.table(LOGITS), REFERENCE: tabular.table(np.log(mu))},
        1,
    )
    assert_near(-found["table"][0, 0], ascent)


def ipo_loss(logits, pairs_N, is_soft):
    """The two-sample squared loss of IPO, in expectation over ordered pairs of w."""
    game, mu = jnp.asarray(GAMES["skew"]), jnp.asarray(REFERENCES["m"])
    ratio_N = jax.nn.log_softmax(logits) - jnp.log(mu)
    h_NN = ratio_N[:, None] - ratio_N[None, :]
    wins_NN = pairs_N[:, None] * pairs_N[None, :]
    if is_soft:
        square_NN = (h_NN - (game - 0.5) / TAU_OF_GRADIENTS) ** 2
    else:
        half = 1 / (2 * TAU_OF_GRADIENTS)
        square_NN = game * (h_NN - half) ** 2 + (1 - game) * (h_NN + half) ** 2
    return jnp.sum(wins_NN * square_NN)


@pytest.mark.parametrize("beta", KNOWN_GRADIENTS)
@pytest.mark.parametrize("is_soft", [False, True])
def test_ipo_gradients(beta, is_soft):
    mixture, _, ascent, known = KNOWN_GRADIENTS[beta]
    slope = jax.grad(ipo_loss)(jnp.asarray(LOGITS), jnp.asarray(mixture), is_soft)
    np.testing.assert_allclose(slope, known, rtol=0, atol=1e-11)
    if beta == 0:  # Online IPO is self-play in expectation.
        assert_near(slope * TAU_OF_GRADIENTS / 4, np.negative(ascent))
