# SPDX-License-Identifier: Apache-2.0
"""Small molecules drawn large: the material of the molecule task and of molecule pretraining.

Source: the compound list of `chemicals` (MIT; names and structures from PubChem, in the public domain), drawn by RDKit
(BSD-3-Clause). The entity is the structure, "compound/<canonical SMILES without stereochemistry>", because compounds
that differ only in stereochemistry have the same drawing.
"""

from __future__ import annotations

import functools
import io
import random
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image
from rdkit import Chem, rdBase
from rdkit.Chem.Draw import rdMolDraw2D

from mini_cmit.tasks.building import pool_of, rgb
from mini_cmit.tasks.sources import package_file

# The usual colours of atoms (CPK), at the strength of the benchmark's other colours.
ELEMENTS: Final = {
    "oxygen": ("O", "red"),
    "nitrogen": ("N", "blue"),
    "chlorine": ("Cl", "green"),
    "bromine": ("Br", "brown"),
    "sulfur": ("S", "yellow"),
    "fluorine": ("F", "pink"),
    "iodine": ("I", "purple"),
}
# Groups that look unlike each other when drawn, as SMARTS.
GROUPS: Final = {
    "benzene ring": "c1ccccc1",
    "nitro group": "[N+](=O)[O-]",
    "carboxylic acid": "[CX3](=O)[OX2H1]",
    "nitrile": "C#N",
    "alcohol": "[CX4][OX2H1]",
    "ether": "[#6;!$(C=O)][OX2;!$(O-C=O)][#6;!$(C=O)]",
}
MOLECULE_BACKGROUNDS: Final = ("#ffffff", "#fbf6ea", "#eef4fa", "#f1f1f1", "#eef6ec")
SMALLEST, LARGEST = 4, 14
# Characters of the SMILES; longer ones can't have 14 atoms or fewer often enough to be worth parsing.
LONGEST_SMILES: Final = 32


@dataclass(frozen=True, kw_only=True)
class Compound:
    entity: str
    smiles: str
    name: str
    atoms: int
    rings: int
    elements: frozenset[str]
    groups: frozenset[str]


@functools.cache
def compounds(pool: str) -> tuple[Compound, ...]:
    """The compounds of a pool ("pretraining", "train", "validation", "test") of 4 to 14 heavy atoms, in file order."""
    return tuple(compound for compound in _all_compounds() if pool_of(compound.entity) == pool)


@functools.cache
def _all_compounds() -> tuple[Compound, ...]:
    patterns = {name: Chem.MolFromSmarts(smarts) for name, smarts in GROUPS.items()}
    symbols = {symbol: name for name, (symbol, _) in ELEMENTS.items()}
    unique: dict[str, Compound] = {}
    for table in ("small", "large"):
        path = package_file("chemicals", "Identifiers", f"chemical identifiers pubchem {table}.tsv")
        with path.open(encoding="utf-8") as lines:
            for index, line in enumerate(lines):
                # Every fourth compound of the large table is plenty, and parsing is what loading costs.
                if table == "large" and index % 4:
                    continue
                # Columns: PubChem number, CAS number, formula, mass, SMILES, InChI, its key, IUPAC name, common name.
                fields = line.rstrip("\n").split("\t")
                smiles, name = fields[4], fields[8] if len(fields) > 8 else fields[7]
                if len(smiles) > LONGEST_SMILES or "." in smiles:
                    continue
                compound = _compound(smiles, name, symbols, patterns)
                if compound is not None:
                    unique.setdefault(compound.entity, compound)
    return tuple(unique.values())


def _compound(smiles: str, name: str, symbols: dict[str, str], patterns: dict[str, Chem.Mol]) -> Compound | None:
    # A few structures of the list break valence rules; they are skipped, RDKit would print each.
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not SMALLEST <= molecule.GetNumHeavyAtoms() <= LARGEST:
        return None
    found = set()
    for atom in molecule.GetAtoms():
        symbol = atom.GetSymbol()
        # Hydrogen drawn as an atom, isotopes, radicals and metals would need marks that no question asks about.
        if symbol != "C" and symbol not in symbols:
            return None
        if atom.GetIsotope() or atom.GetNumRadicalElectrons():
            return None
        if symbol != "C":
            found.add(symbols[symbol])
    canonical = Chem.MolToSmiles(molecule, isomericSmiles=False)
    return Compound(
        entity=f"compound/{canonical}",
        smiles=canonical,
        name=name,
        atoms=molecule.GetNumHeavyAtoms(),
        rings=molecule.GetRingInfo().NumRings(),
        elements=frozenset(found),
        groups=frozenset(name for name, pattern in patterns.items() if molecule.HasSubstructMatch(pattern)),
    )


def draw_compound(rng: random.Random, side: int, compound: Compound) -> Image.Image:
    """The structural formula with thick bonds; atoms other than carbon are letters on a disc of their colour."""
    molecule = Chem.MolFromSmiles(compound.smiles)
    colours = {symbol: _unit(colour) for symbol, colour in ELEMENTS.values()}
    marked = {atom.GetIdx(): colours[atom.GetSymbol()] for atom in molecule.GetAtoms() if atom.GetSymbol() in colours}
    drawer = rdMolDraw2D.MolDraw2DCairo(side, side)
    # RDKit's stubs give every option the type of the options object.
    options: Any = drawer.drawOptions()
    options.useBWAtomPalette()
    options.setBackgroundColour(_unit(rng.choice(MOLECULE_BACKGROUNDS)))
    options.rotate = rng.choice((0, 30, 60, 90, 120, 150))
    options.padding = 0.08
    options.bondLineWidth = max(1, round(3 * side / 160))
    options.scaleBondWidth = False
    options.fixedBondLength = 0.3 * side
    options.minFontSize = max(6, round(15 * side / 160))
    options.maxFontSize = max(6, round(20 * side / 160))
    options.highlightRadius = 0.5
    options.atomHighlightsAreCircles = True
    options.fillHighlights = True
    options.continuousHighlight = False
    rdMolDraw2D.PrepareAndDrawMolecule(
        drawer, molecule, highlightAtoms=list(marked), highlightAtomColors=marked, highlightBonds=[]
    )
    drawer.FinishDrawing()
    return Image.open(io.BytesIO(drawer.GetDrawingText())).convert("RGB")


def _unit(colour: str) -> tuple[float, float, float]:
    red, green, blue = rgb(colour)
    return red / 255, green / 255, blue / 255
