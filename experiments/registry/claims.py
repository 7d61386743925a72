"""What the paper states, as differences between entries that it says are above zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of the paper: the sum of the `better` accuracies is above that of the `worse` ones.

    statement: in the paper's terms.
    where: it stands in the paper.
    better, worse: names of entries, or NAME/VARIANT; as many of the one as of the other.
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
    """One entry has a higher accuracy than another one."""
    return Claim(statement=statement, where=where, better=(better,), worse=(worse,))


def shrinks(small: tuple[str, str], large: tuple[str, str], statement: str, where: str) -> Claim:
    """The gain of one entry over another one, (better, worse), is higher in a small network than in a large one."""
    return Claim(statement=statement, where=where, better=(small[0], large[1]), worse=(small[1], large[0]))


CNN2, ANIL = "omniglot-cnn2", "omniglot-anil"
CLAIMS = (
    above(f"{CNN2}-linnet", f"{CNN2}-maml", "LinNet improves MAML at CNN(2) on Omniglot", "Table 1, section 5.2"),
    above(f"{CNN2}-kfo", f"{CNN2}-maml", "META-KFO improves MAML on Omniglot", "Table 3"),
    above(f"{CNN2}-kfo-paper", f"{CNN2}-maml-paper", "the same, both at the paper's setting", "Tables 3, D.6, D.7"),
    above(f"{CNN2}-msgd", f"{CNN2}-maml", "Meta-SGD improves MAML on Omniglot", "Table 3"),
    above(f"{CNN2}-mc", f"{CNN2}-maml", "Meta-Curvature improves MAML on Omniglot", "Table 3, section 5.3"),
    above(f"{CNN2}-tnet", f"{CNN2}-maml", "T-Nets improve MAML on Omniglot", "Table 3"),
    above(f"{CNN2}-kfo", f"{CNN2}-msgd", "META-KFO improves MAML more than Meta-SGD does", "Table 3, section 5.3"),
    above(f"{CNN2}-kfo", f"{CNN2}-mc", "META-KFO improves MAML more than Meta-Curvature does", "Table 3, section 5.3"),
    above(f"{CNN2}-kfo", f"{CNN2}-tnet", "META-KFO improves MAML more than T-Nets do", "Table 3, section 5.3"),
    above(f"{CNN2}-tnet", f"{CNN2}-msgd", "T-Nets improve MAML more than Meta-SGD does", "Table 3"),
    above(f"{ANIL}-kfo", ANIL, "META-KFO improves ANIL on Omniglot", "Table B.4"),
    above(f"{ANIL}-msgd", ANIL, "Meta-SGD improves ANIL on Omniglot", "Table B.4"),
    above(f"{ANIL}-mc", ANIL, "Meta-Curvature improves ANIL on Omniglot", "Table B.4"),
    above(f"{ANIL}-kfo", f"{ANIL}-msgd", "ANIL benefits more from META-KFO than MSGD", "Table B.4, section B.5"),
    above(f"{ANIL}-kfo", f"{ANIL}-mc", "ANIL benefits more from META-KFO than MC", "Table B.4, section B.5"),
    above(ANIL, f"{CNN2}-maml", "ANIL is above MAML with the same network on Omniglot", "Tables 2 and 3"),
)  # fmt: skip
