"""Document store: one client's documents on its own disk, searched by vectors and by words (LanceDB)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import DataError
from ...core.files import read_json, write_json
from .chunking import chunks, digest

Vectors = np.ndarray[Any, np.dtype[np.float32]]
MANIFEST, TABLE = "manifest.json", "chunks"
QUERIES_AT_ONCE = 64
DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Found:
    """What a client found for one query: its documents, best first, with their scores."""

    documents: list[str]
    scores: list[float]

    def plus(self, constant: float) -> Found:
        """The same with a constant added to every score."""
        return Found(self.documents, [score + constant for score in self.scores])


@dataclass(frozen=True)
class Updated:
    """What an update of a store did."""

    documents: int
    chunks: int
    added: int
    deleted: int


class DocumentStore:
    """Chunks with their vectors in a LanceDB table, and a manifest that is written last.

    The manifest names the table's version, so that what a killed update left behind is never served: a store
    is as it was before the update, or does not exist. Documents are known by their content; an update embeds
    only those that are new. ``encoder`` names the model that the vectors are of: those of another are of no
    use, and the store begins anew.
    """

    def __init__(
        self, folder: Path, encoder: str, tokenizer: Any, chunking: tuple[int, int, int | None]
    ) -> None:
        self.folder, self.encoder, self.tokenizer, self.chunking = folder, encoder, tokenizer, chunking

    def update(self, documents: Sequence[str], embed: Callable[[Sequence[str]], Vectors]) -> Updated:
        """Bring the store in line with the client's documents: embed what is new, delete what is gone."""
        wanted = {digest(text): text for text in documents}
        manifest = self._manifest()
        table: Any = None
        present: set[str] = set()
        if manifest is not None:
            table = self._connect().open_table(TABLE)
            if table.version != manifest["version"]:
                table.restore(manifest["version"])
            present = set(table.search().select(["document"]).limit(None).to_arrow()["document"].to_pylist())
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        new, gone = [key for key in wanted if key not in present], sorted(present - wanted.keys())
        for start in range(0, len(new), DOCUMENTS_AT_ONCE):
            rows = self._rows([wanted[key] for key in new[start : start + DOCUMENTS_AT_ONCE]], embed)
            if table is None:
                table = self._connect().create_table(TABLE, rows, mode="overwrite")
            else:
                table.add(rows)
        for start in range(0, len(gone), 1000):
            table.delete(f"document IN ({', '.join(repr(key) for key in gone[start : start + 1000])})")
        if table is not None and (new or gone or manifest is None):
            self._index_words(table)
            manifest = {
                "encoder": self.encoder,
                "chunking": list(self.chunking),
                "version": table.version,
                "documents": len(wanted),
                "chunks": table.count_rows(),
            }
            write_json(self.folder / MANIFEST, manifest)
        if manifest is None:  # no documents at all
            return Updated(0, 0, 0, 0)
        return Updated(manifest["documents"], manifest["chunks"], len(new), len(gone))

    def search(self, vectors: Vectors, top: int) -> list[Found]:
        """The ``top`` documents nearest to each of (queries, width), by their nearest chunk's inner product.

        LanceDB's flat search gives candidates, of which the scores are computed anew in float64 and rounded
        to float32; equal ones are ordered by name. So a score does not depend on what else is in the store,
        and many stores find what one store of all documents finds.
        """
        table = self._open()
        found: list[Found] = []
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            found += self._search(table, vectors[start : start + QUERIES_AT_ONCE], top)
        return found

    def search_words(self, texts: Sequence[str], top: int) -> list[Found]:
        """The ``top`` documents whose chunks match the words best (BM25 over this store)."""
        table = self._open()
        found = []
        for text in texts:
            rows = table.search(text, query_type="fts").limit(8 * top).to_list()
            best: dict[str, float] = {}
            for row in rows:
                best[row["document"]] = max(best.get(row["document"], 0.0), float(row["_score"]))
            found.append(ranked(best, top))
        return found

    def passages(self, documents: Sequence[str], vector: Vectors | None = None) -> dict[str, str]:
        """A chunk of each of the documents: the nearest to a query's vector, or the first.

        Raises:
            DataError: the store has no such document.
        """
        table = self._open()
        result: dict[str, str] = {}
        for key in documents:
            if not key.isalnum():
                raise DataError(f"no document is called {key!r}")
            rows = table.search().where(f"document = '{key}'").limit(None).to_list()
            if not rows:
                raise DataError(f"no document {key} in this store")
            if vector is None:
                chosen = min(rows, key=lambda row: row["chunk"])
            else:
                chosen = max(rows, key=lambda row: (float(np.dot(row["vector"], vector)), -row["chunk"]))
            result[key] = chosen["text"]
        return result

    # --- parts ---

    def _search(self, table: Any, vectors: Vectors, top: int) -> list[Found]:
        rows = table.count_rows()
        limit = min(rows, max(4 * top, 40))
        while True:
            query = table.search([list(map(float, v)) for v in vectors], vector_column_name="vector")
            batch = query.distance_type("dot").limit(limit).to_arrow()
            width = vectors.shape[1]
            stored = batch["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
            which = np.asarray(
                batch["query_index"].to_pylist() if "query_index" in batch.schema.names else [0] * len(batch)
            )
            names = batch["document"].to_pylist()
            exact = np.einsum("rw,rw->r", stored.astype(np.float64), vectors[which].astype(np.float64))
            scores = exact.astype(np.float32)
            best: list[dict[str, float]] = [{} for _ in vectors]
            worst = [np.inf for _ in vectors]
            for number, name, score in zip(which.tolist(), names, scores.tolist(), strict=True):
                best[number][name] = max(score, best[number].get(name, -np.inf))
                worst[number] = min(score, worst[number])
            found = [ranked(each, top) for each in best]
            # Beyond the worst candidate there may be others that equal it, up to the library's own rounding.
            clear = (
                len(f.scores) == top and f.scores[-1] > w + 1e-5 for f, w in zip(found, worst, strict=True)
            )
            if limit == rows or all(clear):
                return found
            limit = min(rows, 4 * limit)

    def _rows(self, texts: Sequence[str], embed: Callable[[Sequence[str]], Vectors]) -> Any:
        import pyarrow

        pieces = [chunks(text, self.tokenizer, *self.chunking) for text in texts]
        vectors = embed([piece for each in pieces for piece in each])
        names = [digest(text) for text in texts]
        counted = [
            (name, number) for name, each in zip(names, pieces, strict=True) for number in range(len(each))
        ]
        return pyarrow.table(
            {
                "document": [name for name, _ in counted],
                "chunk": pyarrow.array([number for _, number in counted], pyarrow.int32()),
                "text": [piece for each in pieces for piece in each],
                "vector": pyarrow.FixedSizeListArray.from_arrays(
                    pyarrow.array(vectors.ravel()), vectors.shape[1]
                ),
            }
        )

    def _index_words(self, table: Any) -> None:
        from lancedb.index import FTS

        table.create_index("text", config=FTS(), replace=True)

    def _connect(self) -> Any:
        return library().connect(str(self.folder))

    def _manifest(self) -> dict[str, Any] | None:
        """The manifest, if the store is whole and of this encoder and chunking."""
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        manifest: dict[str, Any] = read_json(path)
        fits = manifest["encoder"] == self.encoder and manifest["chunking"] == list(self.chunking)
        return manifest if fits else None

    def _open(self) -> Any:
        """The table as the manifest knows it.

        Raises:
            DataError: there is no store, or it lacks chunks.
        """
        manifest = self._manifest()
        if manifest is None:
            raise DataError(
                f"{self.folder}: no finished index of this encoder; build it with fedcustom index"
            )
        table = self._connect().open_table(TABLE)
        if table.version != manifest["version"]:
            table.checkout(manifest["version"])
        if table.count_rows() != manifest["chunks"]:
            raise DataError(
                f"{self.folder}: holds {table.count_rows()} of {manifest['chunks']} chunks; remove it "
                "and build it again with fedcustom index"
            )
        return table


def ranked(scores: dict[str, float], top: int) -> Found:
    """The ``top`` documents by falling score, equal ones by name."""
    order = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:top]
    return Found([name for name, _ in order], [score for _, score in order])


def library() -> Any:
    """LanceDB.

    Raises:
        DataError: it is not installed.
    """
    os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of every table that it creates
    try:
        import lancedb
    except ImportError:
        raise DataError(
            "method retrieval keeps documents in LanceDB, which is not installed: "
            "pip install 'fedcustom[retrieval]'"
        ) from None
    return lancedb
