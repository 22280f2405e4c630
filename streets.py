"""Streets: a procedural two-domain street scene for unsupervised domain adaptation.

One generator lays out a street in metres and paints it far to near into a map of part numbers; the
label and both looks are read off that one map, so image and label cannot drift apart. "source" fills
every part with one flat colour (a cheap game engine); "target" adds world-anchored texture, sun and
shadows, weather, and the camera's blur and noise.
"""
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

STREETS_CLASSES = ("road", "pavement", "building", "fence", "pole", "sign", "vegetation", "sky", "person", "car")
ROAD, PAVEMENT, BUILDING, FENCE, POLE, SIGN, VEGETATION, SKY, PERSON, CAR = range(10)
STREETS_SIZE = (96, 160)  # rows, columns of a finished scene; everything is drawn at twice that
# Who wins a tied 2x2 block when the label is halved (later wins): thin and rare things, or they would vanish.
_TIE_ORDER = np.array([SKY, BUILDING, ROAD, PAVEMENT, VEGETATION, FENCE, CAR, PERSON, SIGN, POLE], np.uint8)

# Material: grain (amplitude, cells/m), mottling (amplitude, cells/m), joints (period s, period t in m,
# share of the period, darkening). The source look keeps only the joints of fences.
_MATERIALS = {
    "sky": (0, 1, 0, 1, 1, 1, 0, 0), "smooth": (.02, 9, .05, 2, 1, 1, 0, 0),
    "asphalt": (.07, 22, .13, 2, 1, 1, 0, 0), "paving": (.06, 18, .12, 3, .7, .9, .13, .28),
    "brick": (.10, 11, .12, 2, 1.1, .42, .17, .2), "plaster": (.05, 8, .16, 2, 1, 1, 0, 0),
    "foliage": (.20, 9, .34, 14, 1, 1, 0, 0), "cloth": (.10, 16, .12, 20, 1, 1, 0, 0),
    "pickets": (.08, 9, .12, 4, .34, 1e9, .38, .4), "wire": (.06, 9, .1, 4, .5, .5, .5, .35),
}
_MATERIAL_NAMES = tuple(_MATERIALS)
_CIRCLE = np.stack([f(np.arange(12) * np.pi / 6) for f in (np.cos, np.sin)], 1)

# Weather of the target: sky at the zenith and at the horizon, cast (RGB gains), sun (0 diffuse .. 1 hard),
# exposure, contrast, haze per metre, wetness of the road (0..1).
_WEATHERS = (
    ((150, 160, 176), (206, 198, 186), (1.05, 1.00, .92), .35, 1.10, 1.00, .003, 0),     # pale low sun
    ((160, 164, 170), (194, 196, 196), (.98, 1.0, 1.02), .10, 1.08, .94, .003, 0),       # overcast
    ((104, 112, 134), (150, 146, 152), (.88, .96, 1.10), .08, .90, 1.0, .004, .15),      # dusk
    ((178, 182, 184), (184, 186, 186), (1.0, 1.0, 1.02), .05, 1.02, .90, .011, .1),      # fog
    ((116, 122, 130), (150, 154, 158), (.92, 1.0, 1.05), .05, .95, 1.0, .007, .45),      # rain
)

_LOOKS = {
    "source": dict(
        horizon=(.38, .46), eye=(1.9, 2.3), focal=(112, 130), cars=5, people=2.2, trees=4, storeys=(2, 3), jitter=5,
        road=[(96, 96, 102), (108, 106, 108)], pavement=[(152, 150, 152), (178, 170, 158), (122, 118, 118)],
        building=[(196, 124, 92), (208, 188, 150), (152, 152, 168), (172, 96, 84)], window=[(84, 110, 150), (60, 70, 90)],
        roof=[(150, 70, 60), (90, 90, 100)], fence=[(156, 108, 70), (200, 128, 98), (196, 196, 188)],
        pole=[(70, 72, 80), (126, 130, 136)], sign=[(222, 40, 40), (40, 80, 220), (240, 204, 40)],
        vegetation=[(70, 160, 60), (58, 140, 68), (92, 172, 72)], trunk=[(112, 80, 50)], sky=[(120, 180, 245), (142, 196, 250)],
        shirt=[(220, 70, 150), (60, 200, 200), (240, 150, 40)], trousers=[(50, 60, 120), (70, 70, 80)], skin=[(236, 190, 160)],
        car=[(204, 30, 40), (40, 90, 204), (232, 232, 236), (50, 50, 56), (236, 190, 40)]),
    "target": dict(
        horizon=(.42, .52), eye=(1.6, 2.1), focal=(104, 122), cars=6.5, people=3.2, trees=5, storeys=(2, 5), jitter=13,
        road=[(88, 86, 84), (112, 106, 98), (72, 74, 80), (130, 122, 112)],
        pavement=[(122, 118, 112), (142, 130, 116), (98, 98, 100), (148, 112, 98)],
        building=[(142, 84, 68), (122, 114, 104), (168, 156, 138), (100, 98, 100), (130, 120, 90), (88, 102, 104), (178, 170, 162)],
        window=[(52, 58, 64), (70, 72, 72)], roof=[(104, 68, 56), (76, 76, 80)],
        fence=[(98, 84, 70), (112, 114, 110), (72, 82, 70), (150, 146, 138)], pole=[(82, 84, 84), (112, 110, 102), (58, 64, 62)],
        sign=[(166, 62, 56), (64, 88, 138), (184, 164, 84), (176, 176, 170), (60, 110, 84)],
        vegetation=[(72, 86, 48), (96, 94, 52), (122, 86, 46), (58, 72, 56), (108, 106, 72)], trunk=[(78, 68, 58), (60, 54, 48)],
        sky=[(255, 255, 255)], skin=[(190, 144, 118), (120, 84, 64), (214, 172, 150)],
        shirt=[(150, 60, 58), (60, 76, 110), (60, 60, 62), (170, 164, 150), (90, 104, 70), (150, 120, 60), (120, 120, 124)],
        trousers=[(48, 52, 66), (60, 58, 56), (104, 96, 84)],
        car=[(128, 48, 46), (56, 70, 98), (186, 186, 182), (48, 48, 50), (132, 134, 136), (100, 98, 96), (150, 138, 112), (62, 82, 70)]),
}


class _Street:
    """One scene under construction: camera, part table, and the drawing of parts in street coordinates.

    Street coordinates in metres: x across (0 = middle of the road), y up, z ahead of the camera. A bend
    shifts the street by bend*z*z, so objects follow it without knowing of it. `sun` is None for the
    source look, else (towards-sun x, towards-sun z, shadow length per height, hardness 0..1).
    """

    def __init__(self, rng, look, sun):
        self.rng, self.look, self.sun = rng, look, sun
        self.size = (2 * STREETS_SIZE[1], 2 * STREETS_SIZE[0])
        self.ids, self.shadow = Image.new("I", self.size, 0), Image.new("L", self.size, 0)
        self.pen, self.shadow_pen = ImageDraw.Draw(self.ids), ImageDraw.Draw(self.shadow)
        self.parts = []
        self.focal = 2 * rng.uniform(*look["focal"])
        self.cx, self.cy = self.size[0] * rng.uniform(.4, .6), self.size[1] * rng.uniform(*look["horizon"])
        self.eye, self.eye_x = rng.uniform(*look["eye"]), rng.uniform(-1.6, 1.6)
        self.bend = rng.normal(0, .0012) if rng.random() < .5 else 0.0
        self.skyline = np.zeros((2, 128), np.float32)  # building height per metre of z, left and right: casts the shadow

    def colour(self, name, spread=1.0):
        """A colour of the palette `name`, jittered for this instance (one draw for brightness, one for hue)."""
        base = self.look[name][self.rng.integers(len(self.look[name]))]
        step = self.look["jitter"] * spread
        return np.array(base, np.float32) + self.rng.normal(0, step) + self.rng.normal(0, step * .35, 3)

    def light(self, nx, ny, nz):
        """Brightness of a surface by its outward normal; the source look has no light."""
        if self.sun is None:
            return 1.0
        sx, sz, length, hard = self.sun
        facing = max(0.0, (nx * sx + nz * sz) * min(1.0, length) + ny * .9)
        return (.82 + .18 * ny) * (1 - hard) + hard * (.42 + .68 * facing)

    def part(self, label, material, colour, plane, shade=1.0, windows=(0, 0)):
        """Registers a part and gives its number. plane (nx, ny, nz, d): the surface n.p = d in camera axes."""
        self.parts.append((label, _MATERIAL_NAMES.index(material), *colour, shade, *plane, *windows))
        return len(self.parts) - 1

    def front(self, label, material, colour, z, shade=None, **kw):
        """A part facing the camera at depth z (billboards, cross walls, the faces of cars)."""
        return self.part(label, material, colour, (0, 0, 1, z), self.light(0, 0, -1) if shade is None else shade, **kw)

    def side(self, label, material, colour, x, z0, z1, **kw):
        """A part standing along the street at x from z0 to z1, facing the road."""
        x0, x1 = (x + self.bend * z * z - self.eye_x for z in (z0, z1))
        slope = (x1 - x0) / (z1 - z0)
        return self.part(label, material, colour, (1, 0, -slope, x0 - slope * z0), self.light(-np.sign(x), 0, 0), **kw)

    def uv(self, x, y, z):
        z = max(z, .4)
        return (self.cx + self.focal * (x + self.bend * z * z - self.eye_x) / z, self.cy + self.focal * (self.eye - y) / z)

    def fill(self, points, part):
        self.pen.polygon([self.uv(*p) for p in points], fill=part)

    def blob(self, x, y, z, rx, ry, part):
        """A ragged ellipse facing the camera, cut off at the ground: crowns and bushes."""
        (u, v), foot, k = self.uv(x, y, z), self.uv(x, 0, z)[1], self.focal / z
        r = k * self.rng.uniform(.78, 1.15, len(_CIRCLE))
        points = np.stack([u + rx * r * _CIRCLE[:, 0], np.minimum(v - ry * r * _CIRCLE[:, 1], foot)], 1)
        self.pen.polygon(points.ravel().tolist(), fill=part)

    def cast(self, footprint, height):
        """Shadow on the ground of something `height` tall over `footprint` [(x, z), ...]; only ground pixels use it."""
        if self.sun is None:
            return
        sx, sz, length, hard = self.sun
        tips = [(x - sx * length * height, z - sz * length * height) for x, z in footprint]
        n = len(footprint)
        for i in range(n):  # the swept footprint, edge by edge, then the contact shadow that any light leaves
            quad = (footprint[i], footprint[(i + 1) % n], tips[(i + 1) % n], tips[i])
            self.shadow_pen.polygon([self.uv(x, 0, z) for x, z in quad], fill=int(200 * hard))
        self.shadow_pen.polygon([self.uv(x, 0, z) for x, z in footprint], fill=190)

    def ground(self, label, material, colour, x0, x1, z0=.5, z1=120.0):
        part = self.part(label, material, colour, (0, 1, 0, self.eye), self.light(0, 1, 0))
        steps = np.geomspace(z0, z1, 2 if z1 < 1.4 * z0 or not self.bend else 14)
        self.fill([(x0, 0, z) for z in steps] + [(x1, 0, z) for z in steps[::-1]], part)

    # -- things -------------------------------------------------------------------------------------------

    def building(self, x, z0, z1, height, storey):
        """A block along the street: the wall on the street, the wall facing the camera, maybe a pitched roof."""
        rng, s = self.rng, np.sign(x)
        wall, depth = self.colour("building"), s * rng.uniform(6, 10)
        kw = dict(material="brick" if rng.random() < .45 else "plaster", colour=wall, windows=(rng.uniform(1.8, 3.2), storey))
        if rng.random() < .5:
            roof, rise = self.colour("roof"), rng.uniform(1.5, 3.5)
            ridge = (x + depth / 2, height + rise)
            self.fill([(x, height, z0), (*ridge, z0), (*ridge, z1), (x, height, z1)], self.side(BUILDING, "plaster", roof, x, z0, z1))
            self.fill([(x, height, z0), (*ridge, z0), (x + depth, height, z0)], self.front(BUILDING, kw["material"], wall, z0))
        self.fill([(x, 0, z0), (x, height, z0), (x + depth, height, z0), (x + depth, 0, z0)], self.front(BUILDING, z=z0, **kw))
        self.fill([(x, 0, z0), (x, height, z0), (x, height, z1), (x, 0, z1)], self.side(BUILDING, x=x, z0=z0, z1=z1, **kw))
        z = z0 + (z1 - z0) * rng.uniform(.2, .7)  # the door
        self.fill([(x, 0, z), (x, 2.1, z), (x, 2.1, z + 1), (x, 0, z + 1)],
                  self.side(BUILDING, "smooth", self.colour("roof"), x, z0, z1))
        self.skyline[int(s > 0), int(z0):int(z1) + 1] = height

    def fence(self, x, z0, z1):
        height = self.rng.uniform(1.0, 2.0)
        part = self.side(FENCE, ("pickets", "wire")[self.rng.integers(2)], self.colour("fence"), x, z0, z1)
        self.fill([(x, 0, z0), (x, height, z0), (x, height, z1), (x, 0, z1)], part)

    def tree(self, x, z):
        rng, height, green = self.rng, self.rng.uniform(3.5, 7.5), self.colour("vegetation")
        width, base = height * rng.uniform(.22, .34), height * rng.uniform(.3, .42)
        trunk = self.front(VEGETATION, "plaster", self.colour("trunk"), z)
        self.fill([(x - .13, 0, z), (x - .09, height * .6, z), (x + .09, height * .6, z), (x + .13, 0, z)], trunk)
        for i, tone in enumerate((.78, .9, 1.0, 1.1)[::1 if z < 40 else 2]):  # dark underside first, lit tufts last
            part = self.front(VEGETATION, "foliage", green * tone, z, self.light(0, .6, -.5))
            k = 1 - .17 * i
            self.blob(x + rng.normal(0, .16) * width * i, base + (height - base) * (.42 + .1 * i), z, width * k, (height - base) * .5 * k, part)
        self.cast([(x - width * .6, z - .4), (x + width * .6, z - .4), (x + width * .6, z + .4), (x - width * .6, z + .4)], height * .8)

    def bush(self, x, z):
        part = self.front(VEGETATION, "foliage", self.colour("vegetation"), z)
        size = self.rng.uniform(.5, 1.1)
        self.blob(x, size * .7, z, size * self.rng.uniform(1, 1.6), size, part)

    def hedge(self, x, z0, z1):
        height, green = self.rng.uniform(1.0, 2.4), self.colour("vegetation")
        tops = [(x, height * self.rng.uniform(.88, 1.1), z) for z in np.geomspace(z0, z1, 9)]
        self.fill([(x, 0, z0), *tops, (x, 0, z1)], self.side(VEGETATION, "foliage", green, x, z0, z1))

    def pole(self, x, z, height, sign):
        """A pole at least one final pixel wide on even columns, so halving keeps it whole; a lamp arm or a sign on top."""
        rng, part = self.rng, self.front(POLE, "smooth", self.colour("pole"), z)
        (u, foot), (_, top) = self.uv(x, 0, z), self.uv(x, height, z)
        width = max(2, 2 * round(self.focal * .055 / z))
        u = 2 * round((u - width / 2) / 2)
        self.pen.rectangle([u, top, u + width - 1, foot], fill=part)
        self.cast([(x - .08, z), (x + .08, z), (x + .08, z + .15), (x - .08, z + .15)], height)
        if sign:
            sides, radius, turn = ((3, .5, np.pi / 2), (4, .46, np.pi / 4), (8, .42, np.pi / 8), (16, .42, 0))[rng.integers(4)]
            a = np.linspace(0, 2 * np.pi, sides, endpoint=False) + turn
            colours = [self.colour("sign"), np.array((226, 226, 222)) * (1 if self.sun is None else .84)]
            for k, colour in zip((1, .62), colours if rng.random() < .7 else colours[::-1], strict=True):
                face = self.front(SIGN, "smooth", colour, z)
                self.fill([(x + k * radius * np.cos(t), height - .3 + k * radius * np.sin(t), z) for t in a], face)
        else:
            x1, y1 = x - np.sign(x) * 1.3, height + .25
            self.pen.line([(u, top), self.uv(x1, y1, z)], fill=part, width=max(2, int(width * .7)))
            self.fill([(x1 - .4, y1 - .12, z), (x1 - .4, y1 + .08, z), (x1 + .35, y1 + .08, z), (x1 + .35, y1 - .12, z)], part)

    def person(self, x, z):
        rng, h = self.rng, self.rng.uniform(1.5, 1.9)
        stride, lean = rng.uniform(.04, .2) * h, rng.choice((-1, 1)) * .012 * h
        shirt, trousers, skin = (self.front(PERSON, m, self.colour(n), z) for m, n in
                                 (("cloth", "shirt"), ("cloth", "trousers"), ("smooth", "skin")))
        hair = self.front(PERSON, "smooth", self.colour("trunk") * .7, z)

        def shape(points, part):
            self.fill([(x + px * h, py * h, z) for px, py in points], part)

        for foot in (-stride / h, stride / h):
            shape([(-.055 + foot * .2, .5), (.055 + foot * .2, .5), (foot + .04, 0), (foot - .045, 0)], trousers)
        for s in (-1, 1):  # arms, then the body over them
            shape([(s * .10, .81), (s * .15, .78), (s * (.15 + stride * .2), .45), (s * (.10 + stride * .2), .45)], shirt)
        shape([(-.115, .82), (.115, .82), (.095, .46), (-.095, .46)], shirt)
        for part, y, r in ((hair, .93, .078), (skin, .91, .062)):
            shape([(lean + r * .85 * c, y + r * s) for c, s in _CIRCLE.tolist()], part)
        self.cast([(x - .25, z - .1), (x + .25, z - .1), (x + .25, z + .15), (x - .25, z + .15)], h)

    def car(self, x, z, yaw):
        """A body extruded from a side profile; yaw 0 drives away (its rear shows), pi comes, pi/2 crosses."""
        rng, paint = self.rng, self.colour("car")
        length, half = rng.uniform(3.8, 4.7), rng.uniform(.84, .94)
        profile, glass = ((([(-.5, .3), (-.5, .86), (-.40, .96), (-.27, 1.42), (.10, 1.45), (.27, .98), (.49, .82), (.5, .3)]), (2, 4)),
                          ([(-.5, .3), (-.5, .95), (-.44, 1.46), (.08, 1.5), (.27, 1.0), (.49, .86), (.5, .3)], (1, 3)),
                          ([(-.5, .3), (-.5, 1.15), (-.48, 1.85), (.2, 1.9), (.36, 1.2), (.49, 1.0), (.5, .3)], (1, 3)))[rng.choice(3, p=(.45, .4, .15))]
        belt, roof = profile[glass[0]][1], max(y for _, y in profile)
        fx, fz = np.sin(yaw), np.cos(yaw)

        def at(l, w, y):  # l along the length (-.5 rear .. .5 front), w across (-1 left .. 1 right)
            w *= half * (1 if y <= belt + .05 else .84)
            return x + l * length * fx + w * fz, y, z + l * length * fz - w * fx

        def face(points, part, cull=True):  # points clockwise as seen from outside
            p = [self.uv(*q) for q in points]
            area = sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(p, p[1:] + p[:1], strict=True))
            if area > 0 or not cull:
                self.pen.polygon(p, fill=part)
            return area > 0

        def make(colour, nx=0.0, ny=0.0, nz=-1.0, material="smooth"):
            shade = self.light(nx, ny, nz) if self.sun else .9 + .1 * ny
            return self.front(CAR, material, colour, z, shade)

        pane, dark = make(self.colour("window", .5)), make(np.full(3, 34.0))
        for l in (-.5, .5):  # tyres as seen from the end, before the body covers their tops
            for w in (-.95, .6):
                face([at(l * .9, w, 0), at(l * .9, w, .4), at(l * .9, w + .35, .4), at(l * .9, w + .35, 0)], dark, cull=False)
        strips = [(i, *profile[i], *profile[i + 1]) for i in range(len(profile) - 1)]
        for i, l0, y0, l1, y1 in sorted(strips, key=lambda q: -(at(q[1], 0, 0)[2] + at(q[3], 0, 0)[2])):
            run, rise = (l1 - l0) * length, y1 - y0
            norm = np.hypot(run, rise)
            body = make(paint, -rise / norm * fx, run / norm, -rise / norm * fz)
            quad = [at(l0, -1, y0), at(l1, -1, y1), at(l1, 1, y1), at(l0, 1, y0)]
            if face(quad, body) and i in glass:
                k = .12
                face([at(l0 + k * (l1 - l0), -.84, y0 + k * rise), at(l1 - k * (l1 - l0), -.84, y1 - k * rise),
                      at(l1 - k * (l1 - l0), .84, y1 - k * rise), at(l0 + k * (l1 - l0), .84, y0 + k * rise)], pane)
        for end, tint in ((-1, (190, 30, 30)), (1, (236, 232, 210)))[:2 * (z < 40)]:  # lamps and number plate
            lamp = make(np.array(tint, np.float32))
            for w0, w1, y0, y1, part in ((-.95, -.6, .62, .78, lamp), (.6, .95, .62, .78, lamp), (-.3, .3, .45, .58, make(np.full(3, 200.0)))):
                q = [at(end * .5, w0, y0), at(end * .5, w0, y1), at(end * .5, w1, y1), at(end * .5, w1, y0)]
                face(q if end < 0 else q[::-1], part)
        for w in (-1, 1):
            order = 1 if w > 0 else -1
            body = make(paint, w * fz, 0, -w * fx)
            if face([at(l, w, y) for l, y in profile][::order], body):
                cabin = [profile[i] for i in range(glass[0], glass[1] + 2)]
                mid = np.mean(cabin, axis=0)
                face([at(mid[0] + .84 * (l - mid[0]), w, mid[1] + .74 * (y - mid[1]) + .02) for l, y in cabin][::order], pane)
                for l in (-.31, .31):
                    for r, part in ((.34, dark), (.17, make(np.full(3, 150.0)))):
                        face([at(l + r * c / length, w, .34 + r * s) for c, s in _CIRCLE.tolist()], part, cull=False)
        ends = [at(l, w, 0) for l, w in ((-.5, -1), (-.5, 1), (.5, 1), (.5, -1))]
        self.cast([(p[0], p[2]) for p in ends], roof)


def _lay_out(street):
    """Draws the whole scene: ground, then everything standing, far to near."""
    rng, look = street.rng, street.look
    kerb, walk = rng.uniform(3.3, 4.5), rng.uniform(2.0, 3.5)
    line = street.line = kerb + walk  # where lots begin
    street.part(SKY, "sky", street.colour("sky"), (0, 0, 1, 150))  # part 0: what nothing covers
    street.ground(VEGETATION, "foliage", street.colour("vegetation"), -200, 200)
    paving, asphalt = street.colour("pavement"), street.colour("road")
    street.ground(PAVEMENT, "paving", paving, -line - .3, line + .3)
    street.ground(PAVEMENT, "plaster", paving * 1.12, -kerb - .15, kerb + .15)
    street.ground(ROAD, "asphalt", asphalt, -kerb, kerb)
    white = np.full(3, 225.0) if street.sun is None else asphalt * .35 + 120
    if rng.random() < .7:
        for z in np.arange(rng.uniform(2, 6), 60, 7.0):
            street.ground(ROAD, "asphalt", white, -.08, .08, z, z + 3)
    if rng.random() < .35:
        z = rng.uniform(6, 18)
        for x in np.arange(-kerb + .4, kerb - .5, 1.0):
            street.ground(ROAD, "asphalt", white, x, x + .5, z, z + 2.5)

    todo = []  # (z to sort by, draw function, arguments)

    def add(z, draw, *args):
        todo.append((z, draw, args))

    for x in np.arange(-60, 60, 12.0):  # what closes the view: cross buildings and trees
        if rng.random() < .55:
            wall = street.front(BUILDING, "plaster", street.colour("building"), 100, windows=(3, 3))
            top = 3 * rng.integers(*look["storeys"]) + .6
            add(125, street.fill, [(x, 0, 100), (x, top, 100), (x + 12, top, 100), (x + 12, 0, 100)], wall)
        else:
            green = street.front(VEGETATION, "foliage", street.colour("vegetation"), 99)
            add(124, street.blob, x + 6, 2, 99, 8, rng.uniform(3, 6), green)
    for s in (-1, 1):
        z = rng.uniform(.6, 1.2)
        built = rng.uniform(.3, .75)  # how built-up this side is
        while z < 92:
            end = min(z + rng.uniform(6, 15) * (1 + z / 60), 98)
            x, storey = s * line, rng.uniform(2.7, 3.3)
            height = storey * rng.integers(look["storeys"][0], look["storeys"][1] + 1) + .5
            if rng.random() < built:
                add(end, street.building, x + s * rng.choice((0, 0, .8)), z, end - rng.choice((0, 1.5)), height, storey)
            else:
                if rng.random() < .5:
                    add(end, street.building, x + s * rng.uniform(5, 9), z, end, min(height, 2 * storey + .5), storey)
                for zt in np.sort(rng.uniform(z + .5, end, rng.integers(1, 4)))[::-1]:
                    add(end - 1e-3, street.tree if zt > 7 else street.bush, x + s * rng.uniform(2.5, 5), zt)
                add(end - 2e-3, street.fence if rng.random() < .8 else street.hedge, x, z, end)
            z = end
        for z in np.arange(rng.uniform(7, 20), 45, rng.uniform(16, 28)):  # street furniture stands near the kerb
            add(z, street.pole, s * (kerb + .5), z, rng.uniform(4.5, 6.5), False)
        for z in rng.uniform(6, 24, rng.poisson(.8)):
            add(z, street.pole, s * (kerb + rng.uniform(.4, .8)), z, rng.uniform(2.4, 3.2), True)
        for z in rng.uniform(9, 50, rng.poisson(look["trees"] / 4)):
            add(z, street.tree, s * (kerb + rng.uniform(.6, 1.0)), z)
        for z in rng.uniform(5.5, 30, rng.poisson(look["people"] / 2)):
            add(z, street.person, s * (kerb + rng.uniform(.3, walk - .3) if rng.random() < .8 else rng.uniform(.5, kerb)), z)
        # Parked at the kerb and driving on the right: slots of 6.5 m keep cars from standing in each other.
        slots = np.arange(rng.uniform(7, 10), 70, 6.5)
        for z in rng.permutation(slots)[:rng.poisson(look["cars"] / 2.6)]:
            add(z, street.car, s * (kerb - 1.05), z, rng.normal(0, .03) + (0 if s > 0 else np.pi))
        for z in rng.permutation(slots + 2)[:rng.poisson(look["cars"] / 10)]:
            if kerb > 3.9 or s > 0:
                add(z, street.car, s * (kerb - 3.1), z, rng.normal(0, .06) + (0 if s > 0 else np.pi))
    if rng.random() < .22:
        z = rng.uniform(10, 28)
        todo = [t for t in todo if t[1] != street.car or abs(t[0] - z) > 4]  # a car crossing or turning needs room
        add(z, street.car, rng.uniform(-1.5, 1.5), z, rng.choice((-1, 1)) * rng.uniform(.9, 1.6))
    for _, draw, args in sorted(todo, key=lambda t: -t[0]):
        if draw != street.tree or -60 < street.uv(args[0], 0, args[1])[0] < street.size[0] + 60:  # many trees are out of view
            draw(*args)


def _halve_label(label):
    """(2H, 2W) ids -> (H, W): the majority of each 2x2 block, ties to the later class of _TIE_ORDER."""
    rank = np.argsort(_TIE_ORDER).astype(np.uint8)[label]
    a, b, c, d = np.sort([rank[::2, ::2], rank[::2, 1::2], rank[1::2, ::2], rank[1::2, 1::2]], axis=0)
    return _TIE_ORDER[np.where((c == d) | ((b != c) & (a != b)), d, b)]


def _halve_image(image):
    """(2H, 2W, 3) -> (H, W, 3) by area."""
    return (image[::2, ::2] + image[::2, 1::2] + image[1::2, ::2] + image[1::2, 1::2]) * .25


def streets_scene(domain, split, index):
    """Scene `index` of ("source"|"target", "train"|"val"): image uint8 (96, 160, 3) RGB, label uint8 (96, 160), ids 0..9."""
    seed = (2024, ("source", "target").index(domain), ("train", "val").index(split), index)
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    real, sun, weather = domain == "target", None, None
    if real:
        weather = _WEATHERS[rng.integers(len(_WEATHERS))]
        angle = rng.uniform(0, 2 * np.pi)
        sun = (float(np.cos(angle)), float(np.sin(angle)) * .7, rng.uniform(.4, 1.3), weather[3] * rng.uniform(.8, 1.1))
    street = _Street(rng, _LOOKS[domain], sun)
    _lay_out(street)

    ids = np.asarray(street.ids).astype(np.intp)
    table = np.array(street.parts, np.float32)
    of_part = np.ascontiguousarray(table.T)
    label, material = of_part[0].astype(np.uint8)[ids], of_part[1].astype(np.intp)
    # Each pixel's ray meets its part's plane: depth, and texture coordinates (s, t) in metres on that plane.
    nx, ny, nz, d = (of_part[k][ids] for k in range(6, 10))
    rx = ((np.arange(ids.shape[1]) - street.cx) / street.focal).astype(np.float32)[None]
    ry = ((np.arange(ids.shape[0]) - street.cy) / street.focal).astype(np.float32)[:, None]
    depth = np.clip(np.abs(d) / np.maximum(np.abs(nx * rx + ny * ry + nz), 1e-3), .4, 150)
    ground = ny > 0
    x = rx * depth + (street.eye_x - street.bend * depth * depth)
    s, t = np.where(nx == 1, depth, x), np.where(ground, depth, street.eye - ry * depth)

    def outside(where, period_s, period_t, band_s, band_t):
        """Of the pixels `where`, those farther than a band from the middle of their period, by axis; and the periods."""
        u, v = s[where] / period_s, t[where] / period_t
        return np.abs(u - np.floor(u) - .5) > band_s, np.abs(v - np.floor(v) - .5) > band_t, u, v

    image = table[:, 2:5][ids]
    window = np.nonzero((of_part[10] > 0)[ids])
    off_s, off_t, wx, wy = outside(window, of_part[10][ids[window]], of_part[11][ids[window]], .27, .3)
    inside = ~(off_s | off_t)
    window, wx, wy = tuple(k[inside] for k in window), wx[inside], wy[inside]
    pattern = np.array(list(_MATERIALS.values()), np.float32)[material].T  # a column per part
    jointed = np.nonzero(((pattern[6] > 0) & (real | (of_part[0] == FENCE)))[ids])
    jid = ids[jointed]
    off_s, off_t, _, _ = outside(jointed, pattern[4][jid], pattern[5][jid], *[.5 - .5 * pattern[6][jid]] * 2)
    tone = np.ones(ids.shape, np.float32)
    tone[jointed] -= (off_s | off_t & (pattern[5][jid] < 99)) * pattern[7][jid]  # pickets have no cross joints
    if not real:
        image *= (tone * of_part[5][ids])[..., None]
        image[window] = street.colour("window")
        return np.clip(_halve_image(image) + .5, 0, 255).astype(np.uint8), _halve_label(label)

    # Target: texture and light on the surfaces at double size, then air and camera at the final size.
    top, low, cast, _, exposure, contrast, haze, wet = weather
    fine = rng.standard_normal((128, 128), np.float32)
    cloudy = Image.fromarray(np.tile(rng.standard_normal((16, 16), np.float32), (3, 3))).resize((384, 384), Image.BICUBIC)
    coarse = np.asarray(cloudy)[128:256, 128:256]  # the middle of three tiles, so that it wraps around

    def sample(tile, u, v):
        return tile.ravel()[((v.astype(np.int32) & 127) << 7) + (u.astype(np.int32) & 127)]

    tint = rng.uniform(0, 128, len(table)).astype(np.float32)[ids]  # every part reads the tiles elsewhere
    for tile, k in ((fine, 0), (coarse, 2)):
        cells = pattern[k + 1][ids]
        tone += pattern[k][ids] * sample(tile, s * cells + tint, t * cells)
    tone -= (label == BUILDING) * .12 * np.exp(-np.maximum(t, 0))  # dirt at the foot of walls
    tone += (label == CAR) * (np.clip(t, 0, 1.6) - .8) * .22  # paint mirrors the sky above and the road below
    shadow = np.asarray(street.shadow) / np.float32(255)
    if sun[3] > .2:  # a strip of ground is dark while the wall towards the sun stands high enough above it
        wall = street.skyline[int(sun[0] > 0)][np.clip(depth, 0, 127).astype(np.int32)]
        edge_x = street.line if sun[0] > 0 else -street.line
        hidden = np.abs(edge_x - x) < wall * sun[2] * abs(sun[0])
        shadow = np.maximum(shadow, hidden * np.float32(.75 * sun[3]))
    tone *= of_part[5][ids] * (1 - .72 * shadow * ground)
    image = image * np.maximum(tone, .12)[..., None]

    top, low = (np.array(c, np.float32) * np.float32(rng.uniform(.9, 1.08)) for c in (top, low))
    # Panes mirror the sky, each its own share; some are lit at dusk
    pane = sample(fine, np.floor(wx) * 37 + ids[window], np.floor(wy) * 91)
    gloss = np.clip(.30 + .22 * pane + .5 * (wy - np.floor(wy) - .5), 0, 1)[:, None]
    image[window] = street.colour("window") * .8 * (1 - gloss) + low * .85 * gloss
    if exposure < 1:
        image[tuple(k[pane > .9] for k in window)] = np.array((236, 190, 112)) * rng.uniform(.8, 1.1)
    sky = label == SKY
    up = np.broadcast_to(np.clip(-ry, .02, None), ids.shape)[sky]
    across = np.broadcast_to(rx, ids.shape)[sky]
    cloud = sample(coarse, across / (up + .12) * 9 + 500, 14 / (up + .12)) + .5 * sample(coarse, across / (up + .12) * 23 + 500, 31 / (up + .12))
    mix = np.clip(up * 2.2, 0, 1)[:, None]
    image[sky] = (top * mix + low * (1 - mix)) * (1 + rng.uniform(.02, .1) * cloud[:, None])

    image, depth, label = _halve_image(image), depth[::2, ::2, None], _halve_label(label)
    if wet:  # the wet road mirrors what stands above the horizon, smeared downwards
        rows = (street.cy - np.arange(STREETS_SIZE[0])).astype(int)
        mirror = sum(image[np.clip(rows - k, 0, STREETS_SIZE[0] - 1)] for k in (-3, -1, 1, 3)) * .25
        image = image + (wet * rng.uniform(.6, 1.1) * (label == ROAD))[..., None] * (mirror - image)
    clear = np.exp(-haze * rng.uniform(.7, 1.3) * depth)
    image = image * clear + low * (1 - clear)
    gain = (np.array(cast) * exposure * np.exp(rng.normal(0, .09) + rng.normal(0, .03, 3))).astype(np.float32)
    vy, vx = np.ogrid[-1:1:STREETS_SIZE[0] * 1j, -1:1:STREETS_SIZE[1] * 1j]
    image = image * gain * (1 - rng.uniform(.06, .2) * (vx * vx + vy * vy)).astype(np.float32)[..., None]
    image = 118 + (image - 118) * contrast * rng.uniform(.92, 1.08)
    blurred = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(.3, .65)))
    image = blurred + rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(2, 5))
    return np.clip(image + .5, 0, 255).astype(np.uint8), label
