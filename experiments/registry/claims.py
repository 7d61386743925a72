"""The paper's claims, as differences between entries that should be above zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper: the sum of the `better` accuracies is above that of the `worse` ones.

    Attributes:
        statement: in the paper's terms.
        where: its place in the paper.
        better: names of entries, or NAME/VARIANT.
        worse: as many as `better`.
    """

    statement: str
    where: str
    better: tuple[str, ...]
    worse: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.better or len(self.better) != len(self.worse):
            raise ValueError(
                f"{self.statement}: expected as many better as worse entries, got {self.better}, {self.worse}"
            )


def above(better: str, worse: str, statement: str, where: str) -> Claim:
    """The claim that one entry has a higher accuracy than another one."""
    return Claim(statement=statement, where=where, better=(better,), worse=(worse,))


def shrinks(small: tuple[str, str], large: tuple[str, str], statement: str, where: str) -> Claim:
    """Claims that the gain between two entries, (better, worse), is higher in a small network than in a large one."""
    return Claim(statement=statement, where=where, better=(small[0], large[1]), worse=(small[1], large[0]))


def _meta_optimizers(maml: str, data: str) -> list[Claim]:
    """The claims of Table 3."""
    every, most = f"improves MAML on {data}", f"improves MAML most on {data}: more than"
    return [
        above(f"{maml}-kfo", f"{maml}-maml", f"META-KFO {every}", "Table 3"),
        above(f"{maml}-msgd", f"{maml}-maml", f"Meta-SGD {every}", "Table 3"),
        above(f"{maml}-mc", f"{maml}-maml", f"Meta-Curvature {every}", "Table 3, section 5.3"),
        above(f"{maml}-tnet", f"{maml}-maml", f"T-Nets {every.replace('improves', 'improve')}", "Table 3"),
        above(f"{maml}-kfo", f"{maml}-msgd", f"META-KFO {most} Meta-SGD", "Table 3, section 5.3"),
        above(f"{maml}-kfo", f"{maml}-mc", f"META-KFO {most} Meta-Curvature", "Table 3, section 5.3"),
        above(f"{maml}-kfo", f"{maml}-tnet", f"META-KFO {most} T-Nets", "Table 3, section 5.3"),
        above(f"{maml}-tnet", f"{maml}-msgd", f"T-Nets improve MAML on {data} more than Meta-SGD", "Table 3"),
    ]


def _with_fixed_factors(maml: str, data: str) -> list[Claim]:
    """Table 3's claims on META-KFO, for factors that the inner loop does not adapt, as in equations 22 and 23."""
    kfo, where = f"{maml}-kfo-fixed", "Table 3, equations 22 and 23"
    return [
        above(kfo, f"{maml}-maml", f"META-KFO, factors not adapted, improves MAML on {data}", where),
        *(
            above(kfo, f"{maml}-{name}", f"META-KFO, factors not adapted, is above {title} on {data}", where)
            for name, title in (("msgd", "Meta-SGD"), ("mc", "Meta-Curvature"), ("tnet", "T-Nets"))
        ),
    ]


def _with_anil(anil: str, maml: str, data: str) -> list[Claim]:
    """The claims of Tables 2 and B.4."""
    every, most = f"improves ANIL on {data}", f"improves ANIL most on {data}: more than"
    return [
        above(f"{anil}-linnet", anil, f"LinNet {every}", "Table 2"),
        above(f"{anil}-kfo", anil, f"META-KFO {every}", "Table B.4"),
        above(f"{anil}-msgd", anil, f"Meta-SGD {every}", "Table B.4"),
        above(f"{anil}-mc", anil, f"Meta-Curvature {every}", "Table B.4"),
        above(f"{anil}-kfo", f"{anil}-msgd", f"META-KFO {most} Meta-SGD", "Table B.4, section B.5"),
        above(f"{anil}-kfo", f"{anil}-mc", f"META-KFO {most} Meta-Curvature", "Table B.4, section B.5"),
        above(anil, maml, f"ANIL is above MAML on {data}, with the same network", "Tables 2 and 3"),
    ]


def _gain(layers: int) -> tuple[str, str]:
    return f"omniglot-cnn{layers}-kfo", f"omniglot-cnn{layers}-maml"


def _depth() -> list[Claim]:
    """The claims of Table 1 and Figure 4, on Omniglot."""
    shallow = [
        above(
            f"omniglot-cnn{layers}-linnet",
            f"omniglot-cnn{layers}-maml",
            f"LinNet improves MAML at CNN({layers}) on Omniglot",
            "Table 1, section 5.2" if layers < 4 else "section 5.2; Table 1 shows the opposite",
        )
        for layers in (2, 3, 4)
    ]
    deep = "LinNet does not improve MAML at CNN(6) on Omniglot: MAML is above it"
    degrades = "MAML degrades at CNN(6) on Omniglot: CNN(4) is above it"
    gains = [
        shrinks(_gain(small), _gain(large), f"the gain of META-KFO falls from CNN({small}) to CNN({large})", "Figure 4")
        for small, large in ((2, 3), (3, 4), (4, 6), (2, 6))
    ]
    return [
        *shallow,
        above("omniglot-cnn6-maml", "omniglot-cnn6-linnet", deep, "Table 1, section 5.2"),
        above("omniglot-cnn4-maml", "omniglot-cnn6-maml", degrades, "section 5.2"),
        above("omniglot-cnn4-maml", "omniglot-cnn2-maml", "MAML improves from CNN(2) to CNN(4)", "Figure 4"),
        above("omniglot-cnn4-kfo", "omniglot-cnn2-kfo", "META-KFO improves from CNN(2) to CNN(4)", "Figure 4"),
        *gains,
    ]


def _linear(entry: str, data: str, figure: str) -> Claim:
    return above(f"{entry}-softmax-linnet", f"{entry}-softmax", f"LinNet improves softmax regression on {data}", figure)


CLAIMS = (
    _linear("omniglot", "Omniglot", "Figure 3"),
    _linear("cifar_fs", "CIFAR-FS", "Figure 3"),
    _linear("grocery84", "the 84x84 set (of mini-ImageNet)", "Figure B.2"),
    *_meta_optimizers("omniglot-cnn2", "Omniglot"),
    *_with_fixed_factors("omniglot-cnn2", "Omniglot"),
    above(
        "omniglot-cnn2-kfo-paper", "omniglot-cnn2-maml-paper", "META-KFO improves MAML, both as published", "Table 3"
    ),
    *_meta_optimizers("cifar-cnn2", "CIFAR-FS"),
    *_with_anil("omniglot-anil", "omniglot-cnn2-maml", "Omniglot"),
    *_with_anil("cifar-anil", "cifar-cnn2-maml", "CIFAR-FS"),
    *_depth(),
)
