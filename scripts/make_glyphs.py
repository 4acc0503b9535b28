#!/usr/bin/env python
"""Draw characters in Debian's free fonts, as a data set for classification: `--data_set glyphs` of main.py.

    apt-get install $(python scripts/make_glyphs.py --packages)
    python scripts/make_glyphs.py --output glyphs

A class is a Chinese character; an image is its form in one font, 32x32 pixels. 40 designs are for training, and 10 of
other families for the test: brush, pen, stone, screen and poster. The characters are chosen at random from those that
JIS X 0208 (level 1), GB 2312 and Big5 share and that every font has. The same packages give the same file; its SHA-256
is printed.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, MARGIN, DRAWN = 32, 2, 96
# (package, file, index in the file) of every design
TRAIN = (
    ("fonts-aoyagi-soseki", "aoyagi-soseki.ttf", 0),
    ("fonts-arphic-bkai00mp", "bkai00mp.ttf", 0),
    ("fonts-arphic-bsmi00lp", "bsmi00lp.ttf", 0),
    ("fonts-arphic-gbsn00lp", "gbsn00lp.ttf", 0),
    ("fonts-arphic-gkai00mp", "gkai00mp.ttf", 0),
    ("fonts-cns11643-kai", "TW-Kai-98_1.ttf", 0),
    ("fonts-cns11643-sung", "TW-Sung-98_1.ttf", 0),
    ("fonts-cwtex-fs", "cwfs.ttf", 0),
    ("fonts-cwtex-ming", "cwming.ttf", 0),
    ("fonts-dejima-mincho", "dejima-mincho-r227.ttf", 0),
    ("fonts-hanazono", "HanaMinA.ttf", 0),
    ("fonts-horai-umefont", "ume-hgo4.ttf", 0),
    ("fonts-horai-umefont", "ume-tmo3.ttf", 0),
    ("fonts-ipaexfont-gothic", "ipaexg.ttf", 0),
    ("fonts-ipaexfont-mincho", "ipaexm.ttf", 0),
    ("fonts-ipamj-mincho", "ipamjm.ttf", 0),
    ("fonts-kiloji", "kiloji.ttf", 0),
    ("fonts-klee", "KleeOne-Regular.ttf", 0),
    ("fonts-konatu", "Konatu.ttf", 0),
    ("fonts-kouzan-mouhitsu", "kouzan-mouhitsu.ttf", 0),
    ("fonts-lxgw-wenkai", "LXGWWenKai-Light.ttf", 0),
    ("fonts-migmix", "migmix-2p-bold.ttf", 0),
    ("fonts-morisawa-bizud-gothic", "BIZUDGothic-Bold.ttf", 0),
    ("fonts-morisawa-bizud-mincho", "BIZUDMincho-Regular.ttf", 0),
    ("fonts-motoya-l-cedar", "MTLc3m.ttf", 0),
    ("fonts-mplus", "Mplus1-Black.otf", 0),
    ("fonts-mplus", "Mplus1-Regular.otf", 0),
    ("fonts-mplus", "Mplus1-Thin.otf", 0),
    ("fonts-noto-cjk", "NotoSansCJK-Bold.ttc", 2),
    ("fonts-noto-cjk", "NotoSansCJK-Regular.ttc", 0),
    ("fonts-noto-cjk", "NotoSerifCJK-Bold.ttc", 3),
    ("fonts-noto-cjk", "NotoSerifCJK-Regular.ttc", 0),
    ("fonts-reggae", "ReggaeOne-Regular.ttf", 0),
    ("fonts-rocknroll", "RocknRollOne-Regular.ttf", 0),
    ("fonts-sawarabi-gothic", "sawarabi-gothic-medium.ttf", 0),
    ("fonts-seto", "setofont.ttf", 0),
    ("fonts-train", "TrainOne-Regular.ttf", 0),
    ("fonts-wqy-microhei", "wqy-microhei.ttc", 0),
    ("fonts-wqy-zenhei", "wqy-zenhei.ttc", 0),
    ("fonts-yusei-magic", "YuseiMagic-Regular.ttf", 0),
)
TEST = (
    ("fonts-aoyagi-kouzan-t", "AoyagiKouzanT.ttf", 0),
    ("fonts-baekmuk", "gulim.ttf", 0),
    ("fonts-cwtex-kai", "cwkai.ttf", 0),
    ("fonts-dotgothic16", "DotGothic16-Regular.ttf", 0),
    ("fonts-motoya-l-maruberi", "MTLmr3m.ttf", 0),
    ("fonts-oradano-mincho-gsrr", "OradanoGSRR.ttf", 0),
    ("fonts-sawarabi-mincho", "sawarabi-mincho-medium.ttf", 0),
    ("fonts-smiley-sans", "SmileySans-Oblique.ttf", 0),
    ("fonts-stick", "Stick-Regular.ttf", 0),
    ("fonts-unfonts-core", "UnGungseo.ttf", 0),
)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("glyphs"), help="folder of the data set")
    parser.add_argument("--classes", type=int, default=500, help="number of characters, 2 to 1600; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of characters")
    parser.add_argument("--fonts", type=Path, nargs="+", default=[Path("/usr/share/fonts")], help="folders of fonts")
    parser.add_argument("--packages", action="store_true", help="only print the names of the fonts' Debian packages")
    args = parser.parse_args()
    if not 2 <= args.classes <= 1600:
        parser.error("--classes must be from 2 to 1600")
    return args


def load_fonts(designs, folders):
    """The fonts of `designs`; where one is missing, ends the script and names the packages to install."""
    files = {file.name: file for folder in folders for file in folder.rglob("*.[to]t[fc]")}
    missing = sorted({package for package, name, _ in designs if name not in files})
    if missing:
        sys.exit(f"error: fonts are missing; install them: apt-get install {' '.join(missing)}")
    return [ImageFont.truetype(files[name], DRAWN, index=index) for _, name, index in designs]


def shared_characters():
    """The characters of JIS X 0208 (level 1) that are also in GB 2312 and in Big5, in the order of JIS."""
    found = []
    for row in range(16, 48):
        for cell in range(1, 95):
            try:
                character = bytes([row + 0xA0, cell + 0xA0]).decode("euc_jp")
                character.encode("gb2312")
                character.encode("big5")
            except UnicodeError:
                continue
            found.append(character)
    return found


def draw(character, font):
    """The form of a character in a font, as grey levels [32, 32] with ink 255; None where the font does not have it."""
    canvas = Image.new("L", (2 * DRAWN, 2 * DRAWN))
    try:
        ImageDraw.Draw(canvas).text((DRAWN // 2, DRAWN // 2), character, 255, font)
    except OSError:
        # some fonts have characters with invalid drawing instructions
        return None
    box = canvas.getbbox()
    if box is None:
        return None
    ink = canvas.crop(box)
    scale = (SIDE - 2 * MARGIN) / max(ink.size)
    # keep at least one pixel of thin strokes, such as that of the character for "one"
    size = [max(1, round(length * scale)) for length in ink.size]
    image = Image.new("L", (SIDE, SIDE))
    image.paste(ink.resize(size, Image.Resampling.BOX), [(SIDE - length) // 2 for length in size])
    return np.asarray(image)


def draw_all(characters, fonts, count):
    """The first `count` characters that all fonts have, and their forms [count, fonts, 32, 32]."""
    # the forms that fonts show in place of a character that they do not have
    absent = [{form.tobytes() for c in "\uffff\ue83a" if (form := draw(c, font)) is not None} for font in fonts]
    chosen, forms = [], []
    for character in characters:
        drawn = [draw(character, font) for font in fonts]
        if all(form is not None and form.tobytes() not in none for form, none in zip(drawn, absent)):
            chosen.append(character)
            forms.append(drawn)
        if len(chosen) == count:
            return chosen, np.array(forms)
    sys.exit(f"error: the fonts share only {len(chosen)} characters; lower --classes")


def digest_of(arrays):
    """SHA-256 of the arrays of a data set, in the order of their names."""
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def main():
    args = parse_arguments()
    designs = TRAIN + TEST
    if args.packages:
        print(" ".join(sorted({package for package, *_ in designs})))
        return
    fonts = load_fonts(designs, args.fonts)
    characters = shared_characters()
    order = np.random.RandomState(args.seed).permutation(len(characters))
    chosen, forms = draw_all([characters[i] for i in order], fonts, args.classes)
    labels = np.arange(args.classes)
    arrays = {"classes": np.array(chosen)}
    for name, part in (("train", forms[:, : len(TRAIN)]), ("test", forms[:, len(TRAIN) :])):
        arrays[f"{name}_images"] = part.reshape(-1, SIDE, SIDE)
        arrays[f"{name}_labels"] = labels.repeat(part.shape[1])
    args.output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output / "glyphs.npz", **arrays)
    counts = f"{len(arrays['train_labels'])} training images, {len(arrays['test_labels'])} test images"
    print(f"{args.output}/glyphs.npz: {args.classes} characters, {counts}, sha256 {digest_of(arrays)}")


if __name__ == "__main__":
    main()
