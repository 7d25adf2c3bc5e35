"""Each published layout in small, built and read back; folders, packs, kills."""

import importlib.util
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from jaxadv import builders, building, cli, data, sources
from jaxadv.builders import covid

# TFDS and its readers warn on their own account.
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def out(tmp_path):
  return tmp_path / "sets"


@pytest.fixture
def tree(tmp_path):
  folder = tmp_path / "download"
  folder.mkdir()
  return folder


def _picture(path, value, size=(12, 10)):
  """A flat picture, which stays flat when it is stretched or saved as JPEG."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (value,) * 3).save(path)


def _mask(path, covered, size=(12, 10)):
  """255 in the upper `covered` rows."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.zeros(size[::-1], np.uint8)
  pixels[:covered] = 255
  Image.fromarray(pixels).save(path)


def _text(path, *lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def _built(name, tree, out, side=8):
  """Counts by part, and the data set of a part."""
  built = building.build(name, tree, side=side, out=out)
  assert built.name == f"{name}/{side}"
  return built, lambda part: data.load_tfds(built.name, split=part, data_dir=out)


def _classes(dataset):
  return dict(
    zip(dataset.names, [dataset.class_names[k] for k in dataset.labels], strict=True)
  )


def _patients(built, part):
  import tensorflow_datasets as tfds

  records = tfds.builder_from_directory(str(built.path)).as_data_source(part)
  return {record["id"].decode(): record["patient"].decode() for record in records}


ISIC = {  # images and masks of train and of one other part
  "isic2016_segmentation": (
    ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
    ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"),
    ("test", "_Segmentation"),
  ),
  "isic2017_segmentation": (
    ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
    ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
    ("test", "_segmentation"),
  ),
  "isic2018_segmentation": (
    ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
    ("ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"),
    ("val", "_segmentation"),
  ),
}


def _isic(name, tree):
  train, other, (part, suffix) = ISIC[name]
  _picture(tree / train[0] / "ISIC_0000000.jpg", 30)
  _picture(tree / train[0] / "ISIC_0000001.JPG", 60, size=(20, 16))
  _text(tree / train[0] / "LICENSE.txt", "CC-0")
  _mask(tree / train[1] / f"ISIC_0000000{suffix}.png", 5)
  _mask(tree / train[1] / f"ISIC_0000001{suffix}.png", 4, size=(20, 16))
  _picture(tree / other[0] / "ISIC_0000002.jpg", 90)
  _mask(tree / other[1] / f"ISIC_0000002{suffix}.png", 10)
  return train, other, part, suffix


@pytest.mark.parametrize("name", ISIC)
def test_isic_segmentation(name, tree, out):
  train, _, part, _ = _isic(name, tree)
  _picture(tree / train[0] / "ISIC_0000000_superpixels.png", 0)
  built, load = _built(name, tree, out)
  assert built.counts == {"train": 2, part: 1}
  got = load("train")
  assert got.names == ["ISIC_0000000", "ISIC_0000001"]
  assert got.class_names == ("skin", "lesion")
  assert got.images.shape == (2, 8, 8, 3)
  assert got.images.min((1, 2, 3)).tolist() == got.images.max((1, 2, 3)).tolist()
  assert got.images[:, 0, 0, 0].tolist() == [30, 60]
  # row i of 8 is nearest to row (i + 0.5) * 10 / 8 of 10: four lie in the upper five
  assert got.labels[0].tolist() == [[1] * 8] * 4 + [[0] * 8] * 4
  assert got.labels[1].sum() == 2 * 8
  assert load(part).labels.all()


def test_a_mask_that_is_missing_and_an_image_in_two_parts(tree, out):
  train, other, _, suffix = _isic("isic2017_segmentation", tree)
  _picture(tree / other[0] / "ISIC_0000000.jpg", 30)
  with pytest.raises(building.BuildError, match=r"ISIC_0000000\.jpg has no mask"):
    _built("isic2017_segmentation", tree, out)
  _mask(tree / other[1] / f"ISIC_0000000{suffix}.png", 5)
  with pytest.raises(
    building.BuildError, match=r"ISIC_0000000 .* in train and in test"
  ):
    _built("isic2017_segmentation", tree, out)
  (tree / train[0] / "ISIC_0000001.JPG").unlink()
  with pytest.raises(
    building.BuildError, match=r"Data has 1 images but .*Truth 2 mask"
  ):
    _built("isic2017_segmentation", tree, out)
  shutil.rmtree(tree / train[0])
  with pytest.raises(building.BuildError, match=r"_Training_Data.* Download the arch"):
    _built("isic2017_segmentation", tree, out)
  assert not list(out.rglob("*.array_record*"))


def test_a_mask_of_small_numbers_is_refused(tree, out):
  train, _, _, suffix = _isic("isic2017_segmentation", tree)
  Image.fromarray(np.eye(9, dtype=np.uint8)).save(
    tree / train[1] / f"ISIC_0000001{suffix}.png"
  )
  with pytest.raises(
    building.BuildError, match=r"1_segmentation\.png has no .* above 1"
  ):
    _built("isic2017_segmentation", tree, out)


def test_isic_2016_diagnoses_have_no_head_and_two_spellings(tree, out):
  for word, names in (("Training", "01"), ("Test", "23")):
    for n in names:
      _picture(tree / f"ISBI2016_ISIC_Part3_{word}_Data" / f"ISIC_{n}.jpg", 10 * int(n))
  table = "ISBI2016_ISIC_Part3_{}_GroundTruth.csv"
  _text(tree / table.format("Training"), "ISIC_0,malignant", "ISIC_1,benign")
  _text(tree / table.format("Test"), "ISIC_2,0.0", "ISIC_3,1.0")
  _, load = _built("isic2016_task3", tree, out)
  assert _classes(load("train")) == {"ISIC_0": "malignant", "ISIC_1": "benign"}
  assert _classes(load("test")) == {"ISIC_2": "benign", "ISIC_3": "malignant"}


def test_isic_2017_diagnoses(tree, out):
  for n in range(3):
    _picture(tree / "ISIC-2017_Training_Data" / f"ISIC_{n}.jpg", 10 * n)
  _text(
    tree / "ISIC-2017_Training_Part3_GroundTruth.csv",
    "image_id,melanoma,seborrheic_keratosis",
    "ISIC_0,0.0,1.0",
    "ISIC_1,0.0,0.0",
    "ISIC_2,1.0,0.0",
  )
  built, load = _built("isic2017_task3", tree, out)
  assert built.counts == {"train": 3}
  assert _classes(load("train")) == {
    "ISIC_0": "seborrheic_keratosis",
    "ISIC_1": "nevus",
    "ISIC_2": "melanoma",
  }
  with pytest.raises(ValueError, match="'test'"):
    load("test")
  _text(tree / "ISIC-2017_Training_Part3_GroundTruth.csv", "image_id", "ISIC_0")
  with pytest.raises(
    building.BuildError, match="columns image_id; it needs image_id, m"
  ):
    building.build("isic2017_task3", tree, side=9, out=out)


def test_isic_2018_diagnoses(tree, out):
  table = (
    tree
    / "ISIC2018_Task3_Training_GroundTruth"
    / "ISIC2018_Task3_Training_GroundTruth.csv"
  )
  head = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"
  for n in range(2):
    _picture(tree / "ISIC2018_Task3_Training_Input" / f"ISIC_{n}.jpg", 10 * n)
  _text(table, head, '"ISIC_1","0.0","0.0","0.0","0.0","0.0","0.0","1.0"')
  with open(table, "a") as opened:
    opened.write("ISIC_0,1,0,0,0,0,0,0\n\n")
  _, load = _built("isic2018_task3", tree, out)
  assert _classes(load("train")) == {"ISIC_1": "VASC", "ISIC_0": "MEL"}
  assert load("train").images[:, 0, 0, 0].tolist() == [10, 0]
  for row, message in (
    ("ISIC_0,1,1,0,0,0,0,0", "gives ISIC_0 2 classes"),
    ("ISIC_0,0,0,0,0,0,0,0", "gives ISIC_0 0 classes"),
    ("ISIC_0,1,0", "it needs image, mel"),
    ("ISIC_0,2,0,0,0,0,0,0", "label '2'; it needs 0 to 1"),
    ("ISIC_7,1,0,0,0,0,0,0", "names ISIC_7, which is not in"),
  ):
    _text(table, head, row)
    with pytest.raises(building.BuildError, match=message):
      building.build("isic2018_task3", tree, side=9, out=out)
  _text(table, "image,dx", "ISIC_0,nv")
  with pytest.raises(
    building.BuildError, match="columns image, dx; it needs image, me"
  ):
    building.build("isic2018_task3", tree, side=9, out=out)


@pytest.mark.parametrize("root", ["OCT2017", "CellData/OCT", "."])
def test_oct_keeps_a_patient_in_one_part(root, tree, out):
  for part, names in {
    "train": ("CNV-1016042-1", "CNV-7-2", "DME-7-1", "DRUSEN-8-1", "NORMAL-9-1"),
    "test": ("CNV-1-1", "DME-2-1", "DRUSEN-3-12", "NORMAL-1016042-58"),
  }.items():
    for n, name in enumerate(names):
      folder = tree / root / part / name.partition("-")[0]
      _picture(folder / f"{name}.jpeg", 10 * n)
  built, load = _built("kermany_oct", tree, out)
  # patient 1016042 is in the test part under another class
  assert built.counts == {"train": 4, "test": 4}
  assert built.left_out == {"train": 1}
  assert _classes(load("train")) == {
    "CNV-7-2": "CNV",
    "DME-7-1": "DME",
    "DRUSEN-8-1": "DRUSEN",
    "NORMAL-9-1": "NORMAL",
  }
  assert load("test").images.shape == (4, 8, 8, 1)
  patients = _patients(built, "train") | _patients(built, "test")
  assert patients["CNV-7-2"] == patients["DME-7-1"] == "7"
  assert patients["NORMAL-1016042-58"] == "1016042"
  shutil.rmtree(tree / root / "test")
  with pytest.raises(building.BuildError, match=r"no folder \S*test/CNV\. Download"):
    building.build("kermany_oct", tree, side=9, out=out)


def test_chest_x_rays_of_both_namings(tree, out):
  for path in (
    "train/NORMAL/IM-0115-0001.jpeg",
    "train/NORMAL/NORMAL-1557045-0001.jpeg",
    "train/PNEUMONIA/person1_bacteria_1.jpeg",
    "train/PNEUMONIA/VIRUS-564683-0005.jpeg",
    "test/NORMAL/NORMAL2-IM-0383-0001.jpeg",
    "test/PNEUMONIA/person1_virus_6.jpeg",
    "test/PNEUMONIA/BACTERIA-564683-0003.JPEG",
  ):
    _picture(tree / "chest_xray" / path, 50)
  _text(tree / "chest_xray/train/NORMAL/.DS_Store", "x")
  built, _ = _built("kermany_chest_xray", tree, out)
  assert built.left_out == {"train": 1}
  assert _patients(built, "train") == {
    "IM-0115-0001": "IM-0115",
    "NORMAL-1557045-0001": "1557045",
    "person1_bacteria_1": "person1_bacteria",
  }
  assert _patients(built, "test") == {
    "NORMAL2-IM-0383-0001": "NORMAL2-IM-0383",
    "BACTERIA-564683-0003": "564683",
    "person1_virus_6": "person1_virus",
  }
  _picture(tree / "chest_xray/train/NORMAL/scan.jpeg", 50)
  with pytest.raises(building.BuildError, match=r"scan\.jpeg does not say whose it is"):
    building.build("kermany_chest_xray", tree, side=9, out=out)


def test_aptos(tree, out):
  for n, name in enumerate(("000c1434d8d7", "001639a390f0")):
    _picture(tree / "train_images" / f"{name}.png", 10 * n)
  _picture(tree / "test_images" / "0005cfc8afb6.png", 1)
  _text(tree / "train.csv", "id_code,diagnosis", "001639a390f0,4", "000c1434d8d7,0")
  built, load = _built("aptos2019", tree, out)
  assert built.counts == {"train": 2}
  assert _classes(load("train")) == {
    "001639a390f0": "proliferative_DR",
    "000c1434d8d7": "no_DR",
  }
  _text(tree / "train.csv", "id_code,diagnosis", "001639a390f0,5")
  with pytest.raises(building.BuildError, match="label '5'; it needs 0 to 4"):
    building.build("aptos2019", tree, side=9, out=out)
  (tree / "train.csv").write_bytes("id_code,diagnosis,größe\n".encode("latin-1"))
  with pytest.raises(building.BuildError, match=r"train\.csv is no CSV in UTF-8"):
    building.build("aptos2019", tree, side=9, out=out)
  _text(tree / "train.csv", "id_code,diagnosis", "x" * 200_000)
  with pytest.raises(building.BuildError, match=r"train\.csv is no CSV .*field larger"):
    building.build("aptos2019", tree, side=9, out=out)
  _text(tree / "train.csv", "id_code,grade", "001639a390f0,4")
  with pytest.raises(building.BuildError, match="it needs id_code, diagnosis"):
    building.build("aptos2019", tree, side=9, out=out)


COLUMNS = (
  "Image name,Ophthalmologic department,Retinopathy grade,Risk of macular edema "
)


def test_messidor_reads_tables_of_every_base(tree, out):
  """The corrected table goes before the first one, and one may lie inside its base."""
  _picture(tree / "Base11" / "20051019_38557_0100_PP.tif", 20)
  _picture(tree / "Base34" / "20060523_1.tif", 40)
  _text(
    tree / "Annotation_Base11.csv", COLUMNS, "20051019_38557_0100_PP.tif,Paris,3.0,1"
  )
  _text(tree / "Base34" / "Annotation_Base34.csv", COLUMNS, "20060523_1.tif,Brest,0,0")
  _, load = _built("messidor", tree, out)
  assert _classes(load("train")) == {"20051019_38557_0100_PP": "R3", "20060523_1": "R0"}
  assert load("train").images[:, 0, 0, 0].tolist() == [20, 40]
  corrected = tree / "Annotation_Base11_update20161024.csv"
  _text(corrected, COLUMNS, "20051019_38557_0100_PP.tif,Paris,2,1")
  _, load = _built("messidor", tree, out, side=9)
  assert _classes(load("train"))["20051019_38557_0100_PP"] == "R2"
  corrected = tree / "Annotation_Base11_update20171231.csv"
  _text(corrected, COLUMNS, "20051019_38557_0100_PP.tif,Paris,1,1")
  _, load = _built("messidor", tree, out, side=6)
  assert _classes(load("train"))["20051019_38557_0100_PP"] == "R1"
  (tree / "Base34" / "Annotation_Base34.csv").unlink()
  with pytest.raises(building.BuildError, match=r"none of Annotation_Base34_\*\.csv"):
    building.build("messidor", tree, side=7, out=out)


def test_messidor_reads_the_published_format(tree, out):
  """The table was written by xlwt: two rows, grades 3 and 0."""
  pytest.importorskip("xlrd")
  for name in ("20051019_1_PP", "20051019_2_PP"):
    _picture(tree / "Base12" / f"{name}.tif", 20)
  shutil.copy(GOLDEN / "Annotation_Base12.xls", tree)
  _, load = _built("messidor", tree, out)
  assert _classes(load("train")) == {"20051019_1_PP": "R3", "20051019_2_PP": "R0"}
  (tree / "Annotation_Base12.xls").rename(tree / "Annotation_Base12_update20161024.xls")
  (tree / "Annotation_Base12_update20171231.xls").write_bytes(b"<html>")
  with pytest.raises(building.BuildError, match=r"20171231\.xls is torn or no \.xls"):
    building.build("messidor", tree, side=7, out=out)
  (tree / "Annotation_Base12_update20171231.xls").unlink()
  old = "20051019_1_PP.tif,Paris,1,1", "20051019_2_PP.tif,Paris,1,1"
  _text(tree / "Annotation_Base12.csv", COLUMNS, *old)
  _, load = _built("messidor", tree, out, side=9)
  assert _classes(load("train")) == {"20051019_1_PP": "R3", "20051019_2_PP": "R0"}


def test_messidor_2(tree, out):
  for name in ("20051020_43808_0100_PP.png", "IM000004.JPG", "IM000009.JPG", "IM1.png"):
    _picture(tree / "IMAGES" / name, 70)
  _text(
    tree / "messidor_data.csv",
    "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable",
    "20051020_43808_0100_PP.png,2,0,1",
    "IM000004.jpg,1,0,1",
    "IM000009.jpg,,,0",
    "IM1.png,0,0,1",
  )
  built, load = _built("messidor2", tree, out)
  assert _classes(load("train")) == {
    "20051020_43808_0100_PP": "moderate",
    "IM000004": "mild",
    "IM1": "no_DR",
  }
  assert set(_patients(built, "train").values()) == {""}
  _text(tree / "messidor-2.csv", "left;right", "IM1.png;IM000004.JPG")
  built, _ = _built("messidor2", tree, out, side=9)
  patients = _patients(built, "train")
  assert patients["IM1"] == patients["IM000004"] == "examination 1"
  assert patients["20051020_43808_0100_PP"] == ""
  _text(tree / "messidor-2.csv", "left,right", "IM1.png,IM000004.JPG")
  with pytest.raises(
    building.BuildError, match=r"messidor-2\.csv names none of the im"
  ):
    building.build("messidor2", tree, side=7, out=out)


def _chest14(tree, names, folders):
  for name, folder in zip(names, folders, strict=True):
    _picture(tree / folder / name, 33)
  _text(
    tree / "Data_Entry_2017.csv",
    "Image Index,Finding Labels,Follow-up #,Patient ID,OriginalImage[Width,Height],",
    '00000001_000.png,"Cardiomegaly|Emphysema",0,1,2682,2749,',
    "00000001_001.png,No Finding,1,1,2682,2749,",
    "00000002_000.png,Hernia,0,2,2500,2048,",
  )
  _text(tree / "train_val_list.txt", *names[:2])
  _text(tree / "test_list.txt", *names[2:])


@pytest.mark.parametrize(
  "folders",
  [("images",) * 3, ("images_001/images", "images_001/images", "images_002/images")],
)
def test_chest_xray14_is_a_label_set(folders, tree, out):
  names = ["00000001_000.png", "00000001_001.png", "00000002_000.png"]
  _chest14(tree, names, folders)
  built, load = _built("chest_xray14", tree, out)
  train = load("train")
  assert train.kind == "set"
  assert len(train.class_names) == 14
  found = [{train.class_names[k] for k in np.flatnonzero(row)} for row in train.labels]
  assert found == [{"Cardiomegaly", "Emphysema"}, set()]
  assert load("test").labels.tolist() == [[0] * 13 + [1]]
  assert _patients(built, "train") == {"00000001_000": "1", "00000001_001": "1"}
  (tree / folders[2] / names[2]).rename(tree / "elsewhere.png")
  with pytest.raises(building.BuildError, match=r"names 00000002_000\.png|no picture"):
    building.build("chest_xray14", tree, side=9, out=out)


def test_chest_xray14_tables_that_do_not_fit(tree, out):
  names = ["00000001_000.png", "00000001_001.png", "00000002_000.png"]
  _chest14(tree, names, ("images",) * 3)
  table = tree / "Data_Entry_2017.csv"
  table.write_text(table.read_text().replace("Hernia", "Fracture"))
  with pytest.raises(building.BuildError, match="finding 'Fracture'; it is none"):
    building.build("chest_xray14", tree, out=out)
  _text(tree / "test_list.txt", "00000003_000.png")
  with pytest.raises(building.BuildError, match=r"00000003_000\.png, which the table"):
    building.build("chest_xray14", tree, out=out)
  (tree / "test_list.txt").write_bytes(b"\xe4.png")
  with pytest.raises(building.BuildError, match=r"test_list\.txt is no list in UTF-8"):
    building.build("chest_xray14", tree, out=out)
  (tree / "test_list.txt").unlink()
  with pytest.raises(building.BuildError, match=r"no file .*test_list\.txt.*nihcc"):
    building.build("chest_xray14", tree, out=out)


@pytest.mark.parametrize("partition", ["", "_by_hospital"])
def test_rim_one_dl(partition, tree, out):
  folder = "partitioned_by_hospital" if partition else "partitioned_randomly"
  masks = tree / "RIM-ONE_DL_reference_segmentations"
  for n, (place, label) in enumerate(
    (place, label)
    for place in ("training_set", "test_set")
    for label in ("glaucoma", "normal")
  ):
    name = f"r{n}_Im001"
    _picture(tree / "RIM-ONE_DL_images" / folder / place / label / f"{name}.png", n)
    _mask(masks / label / f"{name}-1-Disc-T.png", 8, size=(12, 8))
    _mask(masks / label / f"{name}-1-Cup-T.png", n, size=(12, 8))
  _, load = _built(f"rim_one_dl{partition}", tree, out)
  assert _classes(load("train")) == {"r0_Im001": "glaucoma", "r1_Im001": "normal"}
  assert _classes(load("test")) == {"r2_Im001": "glaucoma", "r3_Im001": "normal"}
  _, load = _built(f"rim_one_dl_segmentation{partition}", tree, out)
  discs = load("test")
  assert discs.class_names == ("background", "disc", "cup")
  cups = dict(zip(discs.names, (discs.labels == 2).sum((1, 2)), strict=True))
  assert cups == {"r2_Im001": 16, "r3_Im001": 24}
  assert (discs.labels > 0).all()
  (masks / "normal" / "r3_Im001-1-Cup-T.png").unlink()
  with pytest.raises(building.BuildError, match=r"r3_Im001\.png has no mask; .*Cup-T"):
    building.build(f"rim_one_dl_segmentation{partition}", tree, side=9, out=out)


def test_covid_ct(tree, out):
  for n, part in enumerate(("train", "val", "test")):
    for kind, name in (
      ("COVID", f"2020.01.24.91-p{n} a.png"),
      ("NonCOVID", f"{n}.jpg"),
    ):
      _picture(tree / "Images-processed" / f"CT_{kind}" / name, 10 * n)
      _text(tree / "Data-split" / kind / f"{part}CT_{kind}.txt", f"{name} ")
  built, load = _built("covid_ct", tree, out)
  assert built.counts == {"train": 2, "val": 2, "test": 2}
  assert _classes(load("val")) == {
    "1.jpg": "CT_NonCOVID",
    "2020.01.24.91-p1 a.png": "CT_COVID",
  }
  _text(tree / "Data-split" / "COVID" / "testCT_COVID.txt", "gone.png")
  with pytest.raises(building.BuildError, match=r"gone\.png, but there is no"):
    building.build("covid_ct", tree, side=9, out=out)


def test_covid_lungs_are_slices_of_volumes(tree, out):
  nibabel = pytest.importorskip("nibabel")

  def volume(path, values):
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), np.eye(4)), path)

  # 8 from right to left, 8 from back to front, 2 from below
  hounsfield = np.full((8, 8, 2), -1000)
  hounsfield[:, :4, 1] = 400  # the back of the upper slice
  lungs = np.zeros((8, 8, 2))
  lungs[:2], lungs[6:] = 1, 2
  volume(tree / "COVID-19-CT-Seg_20cases" / "coronacases_001.nii.gz", hounsfield)
  volume(tree / "COVID-19-CT-Seg_20cases" / "radiopaedia_4.nii.gz", 0 * lungs + 255)
  for case in ("coronacases_001", "radiopaedia_4"):
    volume(tree / "Lung_Mask" / f"{case}.nii.gz", lungs)
  built, load = _built("covid19_ct_lungs", tree, out)
  got = load("train")
  assert got.names == [
    *("coronacases_001 0", "coronacases_001 1"),
    *("radiopaedia_4 0", "radiopaedia_4 1"),
  ]
  assert got.class_names == ("background", "left_lung", "right_lung")
  assert got.images[:, :4, :, 0].mean((1, 2)).tolist() == [0, 0, 255, 255]  # in front
  assert got.images[:, 4:, :, 0].mean((1, 2)).tolist() == [0, 255, 255, 255]
  assert got.labels[0, 3].tolist() == [1, 1, 0, 0, 0, 0, 2, 2]
  assert set(_patients(built, "train").values()) == {"coronacases_001", "radiopaedia_4"}
  mask = tree / "Lung_Mask" / "radiopaedia_4.nii.gz"
  volume(mask, 3 * lungs)
  with pytest.raises(
    building.BuildError, match=r"_4\.nii\.gz has the value 3; its cla"
  ):
    building.build("covid19_ct_lungs", tree, side=9, out=out)
  volume(mask, RNG.integers(0, 3, lungs.shape))
  mask.write_bytes(mask.read_bytes()[:-20])
  with pytest.raises(building.BuildError, match=r"radiopaedia_4\.nii\.gz is torn"):
    building.build("covid19_ct_lungs", tree, side=7, out=out)
  assert covid._volume.cache_info().currsize == 0
  volume(mask, lungs[..., :1])
  with pytest.raises(building.BuildError, match="both need one shape"):
    building.build("covid19_ct_lungs", tree, side=9, out=out)


@pytest.mark.parametrize("name", builders.BUILDERS)
def test_what_is_missing_is_named_with_where_to_get_it(name, tree, out):
  with pytest.raises(building.BuildError, match=r"https://\S+"):
    building.build(name, tree, out=out)
  assert not out.exists() or not list(out.rglob("dataset_info.json"))
  for side, words in (("", "DIR;"), ("/128", "DIR --side 128;"), ("/300", "DIR --sid")):
    with pytest.raises(FileNotFoundError, match=f"build {name} --manual-dir {words}"):
      data.load_tfds(name + side, data_dir=out)


def test_tfds_builds_them_itself(tree, out):
  """By name, with its own switch for the folder, and once only through ours."""
  import tensorflow_datasets as tfds

  _isic("isic2017_segmentation", tree)
  builder = tfds.builder("isic2017_segmentation/128", data_dir=str(out))
  config = tfds.download.DownloadConfig(manual_dir=str(tree))
  builder.download_and_prepare(download_config=config)
  got = data.load_tfds("isic2017_segmentation/128", split="train", data_dir=out)
  assert got.images.shape == (2, 128, 128, 3)
  with pytest.raises(building.BuildError, match="is there already; delete it"):
    building.build("isic2017_segmentation", tree, side=128, out=out)


def _pack(path, **changes):
  rng = np.random.default_rng(0)
  arrays = {
    "images": rng.integers(0, 256, (10, 8, 6, 3)).astype(np.uint8),
    "labels": rng.integers(0, 2, 10),
    "split": np.array(["test"] * 3 + ["train"] * 5 + ["val"] * 2),
    "ids": np.array([f"case ä {n}" for n in range(10)]),
    "class_names": np.array(["no, none", "a lesion"]),
  } | changes
  np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
  return path


RNG = np.random.default_rng(1)
PACKS = {
  "classes": {},
  "masks": {"labels": None, "masks": RNG.integers(0, 2, (10, 8, 6)).astype(np.uint8)},
  "sets": {"labels": RNG.integers(0, 2, (10, 2))},
  "grey": {"images": RNG.integers(0, 256, (10, 8, 6, 1)).astype(np.uint8)},
  "floats": {"images": RNG.random((10, 8, 6, 2), np.float32)},
  "five channels": {"images": RNG.integers(0, 256, (10, 8, 6, 5)).astype(np.uint8)},
  "volumes": {
    "images": RNG.random((10, 4, 8, 6, 1), np.float32),
    "labels": None,
    "masks": RNG.integers(0, 3, (10, 4, 8, 6)),
    "class_names": np.array(["a", "b", "c"]),
  },
  "no words": {"split": None, "class_names": None, "ids": None},
}


def _same(one, other):
  assert one.images.dtype == other.images.dtype
  assert one.labels.dtype == other.labels.dtype
  np.testing.assert_array_equal(one.images, other.images)
  np.testing.assert_array_equal(one.labels, other.labels)
  assert one.names == other.names
  assert one.class_names == other.class_names


@pytest.mark.parametrize("kind", PACKS)
def test_a_pack_comes_back_bit_for_bit(kind, tmp_path, out):
  path = _pack(tmp_path / "pack.npz", **PACKS[kind])
  built = building.convert(path, "mine", out=out)
  assert sum(built.counts.values()) == 10
  for part in built.counts:
    _same(data.load(path, split=part), data.load_tfds("mine", split=part, data_dir=out))
  whole = data.load_tfds("mine", data_dir=out)
  assert sorted(whole.names) == sorted(data.load(path).names)


def test_one_volume_and_every_fifth_image(tmp_path, out):
  image = RNG.integers(0, 256, (4, 8, 6, 1)).astype(np.uint8)
  np.savez(tmp_path / "volume.npz", image=image, mask=(image[..., 0] > 99).astype(int))
  assert building.convert(tmp_path / "volume.npz", "volume", out=out).counts == {
    "train": 1
  }
  _same(data.load(tmp_path / "volume.npz"), data.load_tfds("volume", data_dir=out))
  path = _pack(tmp_path / "pack.npz", split=None)
  assert building.convert(path, "fifth", out=out).counts == {"train": 8, "test": 2}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"class_names": np.array(["a", " b"])}, "have no blanks around"),
    ({"class_names": np.array(["a", "a"])}, "label names are duplicated"),
    ({"split": np.array(["all"] * 10)}, "'all' cannot be the name of a part"),
    ({"split": np.array(["fold 1"] * 10)}, "'fold 1' cannot be"),
    ({"labels": np.full(10, 7)}, "label 7, outside"),
  ],
)
def test_packs_that_do_not_fit_are_refused(changes, message, tmp_path, out):
  with pytest.raises(building.BuildError, match=message):
    building.convert(_pack(tmp_path / "pack.npz", **changes), "mine", out=out)
  assert not list(out.rglob("dataset_info.json"))


def _folder(folder, count=6, size=(8, 6), values=(0, 255)):
  for n in range(count):
    _picture(folder / "images" / f"p{n}.jpg", 10 * n, size)
    path = folder / "masks" / f"p{n}_mask.png"
    path.parent.mkdir(exist_ok=True)
    pixels = np.full(size[::-1], values[0], np.uint8)
    pixels[: n + 1] = values[-1]
    Image.fromarray(pixels).save(path)
  return folder


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (0, 3)])
def test_a_folder_comes_back_bit_for_bit(values, tmp_path, out):
  folder = _folder(tmp_path / "f", values=values)
  assert building.convert(folder, "mine", out=out).counts == {"train": 5, "test": 1}
  for part in ("train", "test"):
    got = data.load_tfds("mine", split=part, data_dir=out)
    _same(data.load(folder, split=part), got)


def test_a_folder_of_parts_resized_and_of_16_bits(tmp_path, out):
  for part, count in (("train", 3), ("val", 2)):
    _folder(tmp_path / "f" / part, count, size=(10, 12))
  building.convert(tmp_path / "f", "mine", side=8, out=out)
  for part in ("train", "val"):
    want = sources.load_folder(tmp_path / "f", split=part, size=8)
    _same(want, data.load_tfds("mine", split=part, data_dir=out))
  deep = _folder(tmp_path / "deep", 1)
  pixels = RNG.integers(0, 65536, (6, 8)).astype(np.uint16)
  (deep / "images" / "p0.jpg").unlink()
  Image.fromarray(pixels).save(deep / "images" / "p0.png")
  building.convert(deep, "deep", out=out)
  _same(data.load(deep), data.load_tfds("deep", data_dir=out))


def test_folders_that_do_not_fit_leave_nothing(tmp_path, out):
  (tmp_path / "empty").mkdir()
  with pytest.raises(building.BuildError, match="put pictures into images/"):
    building.convert(tmp_path / "empty", "mine", out=out)
  folder = _folder(tmp_path / "f")
  _picture(folder / "images" / "p3.jpg", 1, size=(9, 9))
  with pytest.raises(building.BuildError, match=r"p3\.jpg is uint8 .*--side 128"):
    building.convert(folder, "mine", out=out)
  floats = _folder(tmp_path / "floats", 1)
  (floats / "images" / "p0.jpg").unlink()
  Image.fromarray(np.full((6, 8), 1.5, np.float32)).save(floats / "images" / "p0.tif")
  with pytest.raises(
    building.BuildError, match=r"p0\.tif has values in \[1\.5, 1\.5\]"
  ):
    building.convert(floats, "mine", out=out)
  grey = _folder(tmp_path / "grey", values=(0, 77))
  with pytest.raises(building.BuildError, match="grey values such as 77"):
    building.convert(grey, "mine", out=out)
  (folder / "masks" / "p3_mask.png").unlink()
  with pytest.raises(building.BuildError, match=r"p3\.jpg has no mask"):
    building.convert(folder, "mine", out=out)
  assert not [path for path in out.rglob("*") if "mine" in path.name and path.is_file()]


def test_a_folder_is_never_in_memory(tmp_path, out):
  """Forty pictures are 31 MB; each is read alone."""
  folder = _folder(tmp_path / "f", 40, size=(512, 512))
  tracemalloc.start()
  building.convert(folder, "mine", out=out)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 12e6


def test_names_that_are_taken_or_not_allowed(tmp_path, out):
  path = _pack(tmp_path / "pack.npz")
  for name, message in (
    ("Mine", "small letters"),
    ("my set", "small letters"),
    ("mnist", "has a data set 'mnist'"),
    ("isic2018_task3", "has a data set"),
  ):
    with pytest.raises(building.BuildError, match=message):
      building.convert(path, name, out=out)
  building.convert(path, "mine", out=out)
  with pytest.raises(building.BuildError, match="is there already; delete it"):
    building.convert(path, "mine", out=out)
  with pytest.raises(building.BuildError, match="a side is for folders"):
    building.convert(path, "other", side=8, out=out)


def test_tfds_alone_reads_what_was_built(tmp_path, out):
  built = building.convert(_pack(tmp_path / "pack.npz"), "mine", out=out)
  code = (
    "import sys, tensorflow_datasets as tfds; "
    f"b = tfds.builder_from_directory({str(built.path)!r}); "
    "r = b.as_data_source('val'); "
    "print(b.info.features['label'].names, len(r), r[0]['image'].shape, "
    "r[0]['id'].decode(), 'tensorflow' in sys.modules, 'jaxadv' in sys.modules)"
  )
  shown = _run(code, tmp_path).stdout.strip()
  assert shown == "['no, none', 'a lesion'] 2 (8, 6, 3) case ä 8 False False"


def _run(code, cwd, **environment):
  return subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_killed_build_leaves_nothing_that_looks_prepared(tmp_path, out):
  folder = _folder(tmp_path / "f")
  code = (
    "import contextlib, os, signal; from jaxadv import building\n"
    "@contextlib.contextmanager\n"
    "def dies(label, total, done=0):\n"
    "  left = [3]\n"
    "  def advance(count, note):\n"
    "    left[0] -= count\n"
    "    left[0] or os.kill(os.getpid(), signal.SIGKILL)\n"
    "  yield advance\n"
    f"building.convert({str(folder)!r}, 'mine', out={str(out)!r}, progress=dies)\n"
  )
  assert _run(code, tmp_path).returncode == -signal.SIGKILL
  (left,) = (out / "mine").iterdir()
  assert left.name.startswith("incomplete")
  with pytest.raises(FileNotFoundError, match="no data set 'mine'"):
    data.load_tfds("mine", data_dir=out)
  building.convert(folder, "mine", out=out)
  _same(
    data.load(folder, split="train"),
    data.load_tfds("mine", split="train", data_dir=out),
  )


def test_the_command_builds_and_says_how_to_load(tree, out, capsys, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(out))
  _isic("isic2017_segmentation", tree)
  words = ["build", "isic2017_segmentation", "--manual-dir", str(tree), "--side", "8"]
  logging.getLogger("absl").setLevel(logging.INFO)
  found = importlib.util.find_spec  # the rest of the report extra is not needed
  monkeypatch.setattr(
    "importlib.util.find_spec",
    lambda name, *rest: None if name == "sklearn" else found(name, *rest),
  )
  assert cli.main([*words, "--out", str(out)]) == 0
  assert logging.getLogger("absl").level == logging.CRITICAL
  shown, progress = capsys.readouterr()
  assert "train 2, test 1" in shown
  assert "tfds:isic2017_segmentation/8" in shown
  assert "3/3" in progress
  assert "Downloading" not in shown
  assert cli.main([*words, "--out", str(out), "--no-progress"]) == 2
  assert "is there already" in capsys.readouterr().err


def test_a_converted_folder_is_found_by_its_name_alone(tmp_path, out):
  folder = _folder(tmp_path / "f")
  words = ["build", str(folder), "--name", "mine", "--no-progress", "--out", str(out)]
  assert cli.main(words) == 0
  code = "from jaxadv import data; print(data.load('tfds:mine', split='test').names)"
  done = _run(code, tmp_path, TFDS_DATA_DIR=str(out))
  assert done.stdout.strip() == "['p4']"


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["aptos2019"], "is a builder; write NAME --manual-dir DIR"),
    (["aptos2019", "--name", "x"], "is a builder"),
    (["folder"], "is no builder; write"),
    (["folder", "--manual-dir", "x"], "is no builder; write"),
    ([".", "--name", "x", "--side", "0"], "the side is 0"),
    (["missing.npz", "--name", "x"], "is no builder, folder or pack; the builders are"),
    (["aptos2019", "--manual-dir", "missing"], r"no file missing/train.csv"),
    (["aptos2019", "--manual-dir", ".", "--side", "0"], "the side is 0"),
  ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["build", *words, "--out", str(tmp_path / "sets")]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["fundus_idrid_optic_disc_128", "blood_bccd_cells_64"])
def test_a_real_pack(name, out):
  try:
    path = data.resolve(name)
  except FileNotFoundError:
    pytest.skip(f"the data pack {name} is not on this machine")
  building.convert(path, "mine", out=out)
  for part in ("train", "test"):
    _same(data.load(path, split=part), data.load_tfds("mine", split=part, data_dir=out))
