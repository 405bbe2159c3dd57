# SPDX-License-Identifier: Apache-2.0
"""Small data sets in the layouts in which the real ones are published, with records that cannot be used."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

TEN = [{"answer": word, "answer_confidence": "yes"} for word in ("a cat", "cat", *["the cat"] * 6, "dog", "dog")]


def picture(path: Path, size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (40, 90, 120)).save(path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def vizwiz_caption(root: Path) -> None:
    for split in ("train", "val"):
        names = [f"VizWiz_{split}_{i:08d}.jpg" for i in range(3)]
        for name in names[:2]:
            picture(root / split / name)
        write_json(
            root / "annotations" / f"{split}.json",
            {
                "info": {},
                "images": [{"file_name": name, "id": i, "text_detected": True} for i, name in enumerate(names)],
                "annotations": [
                    {"caption": f"caption {k} of picture {i}", "image_id": i, "is_rejected": False, "id": 5 * i + k}
                    for i in range(2)
                    for k in range(2)
                ],
            },
        )


def vizwiz_vqa(root: Path) -> None:
    for split in ("train", "val"):
        picture(root / split / "0.jpg")
        picture(root / split / "1.jpg")
        records = [
            {"image": "0.jpg", "question": "What is it?", "answers": TEN, "answer_type": "other", "answerable": 1},
            {"image": "1.jpg", "question": "What now?", "answers": TEN, "answer_type": "other", "answerable": 1},
            # The public test set has no answers.
            {"image": "1.jpg", "question": "And this?", "answers": []},
        ]
        write_json(root / "Annotations" / f"{split}.json", records)


def textcaps(root: Path) -> None:
    for key in ("aa", "bb"):
        picture(root / "train_images" / f"{key}.jpg")
    for split in ("train", "val"):
        data = [
            {"image_id": key, "caption_id": k, "caption_str": f"A sign {k} says {key}.", "set_name": split}
            for key in ("aa", "bb", "gone")
            for k in range(2)
        ]
        write_json(root / f"TextCaps_0.1_{split}.json", {"dataset_name": "textcaps", "data": data})


def flickr30k(root: Path) -> None:
    images = []
    for split in ("train", "train", "val", "test", "test"):
        name = f"{len(images)}.jpg"
        picture(root / "flickr30k-images" / name)
        sentences = [{"raw": f"Sentence {k} of {name}", "tokens": [], "sentid": k} for k in range(5)]
        images.append({"filename": name, "split": split, "sentences": sentences, "imgid": len(images)})
    write_json(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def sk_vg(root: Path) -> None:
    picture(root / "images" / "7.jpg", (200, 100))
    record = {
        "image_name": "7.jpg",
        "knowledge": "Ann wears red",
        "ref_exp": "the woman who wears red",
        "bbox": {"x": 60.0, "y": 50.0, "width": 40.0, "height": 50.0},
    }
    gone = {**record, "image_name": "8.jpg"}
    write_json(root / "annotations.json", {"train": [record, record, gone], "val": [record], "test": [record]})


def iconqa(root: Path) -> None:
    for split in ("train", "val", "test"):
        for key, answer in (("9", 1), ("10", 0), ("11", 7)):
            folder = root / "iconqa_data" / "iconqa" / split / "choose_txt" / key
            picture(folder / "image.png")
            record = {"question": "How many?", "choices": ["3", "4"], "answer": answer, "ques_type": "choose_txt"}
            write_json(folder / "data.json", record)


def ocr_vqa(root: Path) -> None:
    records = {}
    for number, split in enumerate((1, 1, 2, 3)):
        key = f"00{number}"
        picture(root / "images" / f"{key}.jpg")
        records[key] = {
            "imageURL": f"http://images.example/{key}.01.jpg",
            "questions": ["Who wrote this book?", "What is the title?"],
            "answers": ["Ann Author", ""] if number == 0 else ["Bob", "A Title"],
            "title": "A Title",
            "split": split,
        }
    write_json(root / "dataset.json", records)


def kvqa(root: Path) -> None:
    records = {}
    for number, split in enumerate(([1, 3], [1, 1], [2, 1], [3, 1], [7, 1])):
        picture(root / "KVQAimgs" / f"{number}.jpg")
        records[str(number)] = {
            "imgPath": f"KVQAimgs/{number}.jpg",
            "Questions": ["Who is in the left?", "How many people are there?"],
            "Answers": ["Ann", 2],
            "NamedEntities": ["Ann", "Bob"],
            "split": split,
        }
    write_json(root / "dataset.json", records)


def pmc_vqa(root: Path) -> None:
    picture(root / "images" / "PMC1_F1.jpg")
    columns = ("Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D")
    choices = (" A:MRI ", " B:CT ", " C:PET ", " D:X-ray ")
    for name, rows in (
        ("train.csv", (("CT", choices), ("B", choices), ("none", choices), ("B", (" A:x", " B:x", "y", "z")))),
        ("test_clean.csv", (("C", choices),)),
    ):
        with (root / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(["PMC1_F1.jpg", "Which modality?", answer, *given] for answer, given in rows)


def conversation(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**fields, "conversations": turns}


def coin_task(folder: Path, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> None:
    write_json(folder / "train.json", list(train))
    write_json(folder / "test.json", list(test))


def coin(root: Path, images: Path) -> None:
    picture(images / "COCO2014" / "train2014" / "1.jpg", (200, 100))
    shown = "COCO2014/train2014/1.jpg"
    for task in ("TextVQA", "ImageNet", "GQA", "VizWiz", "VQAv2", "OCRVQA"):
        coin_task(
            root / task,
            [conversation(f"<image>\nWhat is {i}?\nAnswer briefly.", f"thing {i}", id=i, image=shown) for i in (0, 1)],
            [{"question_id": i, "image": shown, "text": f"What is {i}?", "answer": f"thing {i}"} for i in (0, 1)],
        )
    coin_task(
        root / "ScienceQA",
        [conversation("Which?\nA. x\nB. y", "A", id="s1"), conversation("<image>\nWhich?", "B", id="s2", image=shown)],
        [{"question_id": "s3", "text": "Which?\nA. x\nB. y", "answer": "B"}],
    )
    # The lower half of a 2:1 picture: padded to a square it spans a quarter to three quarters of the height.
    box = "[0.0, 0.5, 0.5, 0.75]"
    coin_task(
        root / "Grounding",
        [conversation("<image>\nWhere?", box, id=i, image=shown) for i in (0, 1)]
        + [conversation("<image>\nWhere?", "[0.1, 0.2]", id=2, image=shown)],
        [{"question_id": 0, "image": shown, "text": "Where?", "answer_bbox": box, "size": [200, 100]}],
    )


def ucit(root: Path, images: Path) -> None:
    picture(images / "any.jpg")
    files = {
        "ImageNet-R": "train.json", "ArxivQA": "train_4w.json", "VizWiz": "train.json", "IconQA": "train.json",
        "CLEVR": "train_4w.json", "Flickr30k": "train_brief_4w.json",
    }  # fmt: skip
    for task, train in files.items():
        rows = [conversation(f"<image>\nWhat {i}?", f"red thing {i}", id=i, image="any.jpg") for i in (0, 1)]
        write_json(root / task / train, rows)
        questions = [{"question_id": i, "image": "any.jpg", "text": "What?", "answer": f"red {i}"} for i in range(3)]
        write_json(root / task / "test_3000.json", questions)
        if task in ("VizWiz", "Flickr30k"):
            captions = [{"image_id": i, "id": 2 * i + k, "caption": f"{k} of {i}"} for i in (1, 2) for k in (0, 1)]
            write_json(root / task / "val_coco_type_3000.json", {"images": [], "annotations": captions})
